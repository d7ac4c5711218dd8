"""Tiny checkpoints in big_vision's published layouts, from seeded numbers.

Names and shapes follow models/vit.py, models/ppp/gemma.py, models/proj/image_text and
models/proj/paligemma of big_vision; nothing here is shared with our tables.
"""

import numpy as np

WIDTH, DEPTH, MLP, HEADS, PATCH, SIDE = 24, 3, 40, 3, 2, 6
VOCAB, GEMMA_WIDTH, GEMMA_DEPTH, GEMMA_MLP, HEAD_DIM = 37, 20, 2, 28, 6
PIXELS = np.sin(np.arange(2 * SIDE * SIDE * 3, dtype=np.float32)).reshape(2, SIDE, SIDE, 3)
TOKENS = np.array([[3, 36, 0, 17, 17, 5, 9, 30, 2]])


def _dense(name: str, inputs: tuple, outputs: tuple) -> dict[str, tuple]:
    return {f"{name}/kernel": (*inputs, *outputs), f"{name}/bias": outputs}


def _norm(name: str) -> dict[str, tuple]:
    return {f"{name}/scale": (WIDTH,), f"{name}/bias": (WIDTH,)}


def _attention(name: str) -> dict[str, tuple]:
    heads = HEADS, WIDTH // HEADS
    into = {n: _dense(f"{name}/{n}", (WIDTH,), heads) for n in ("query", "key", "value")}
    return into["query"] | into["key"] | into["value"] | _dense(f"{name}/out", heads, (WIDTH,))


def _mlp(name: str) -> dict[str, tuple]:
    return _dense(f"{name}/Dense_0", (WIDTH,), (MLP,)) | _dense(f"{name}/Dense_1", (MLP,), (WIDTH,))


def _stacked(shapes: dict, before: str, stack: str, layers: int, scan: bool) -> dict[str, tuple]:
    """Layers under one name on a first axis, or each under its own."""
    if scan:
        return {f"{before}{stack}/{n}": (layers, *shape) for n, shape in shapes.items()}
    one = stack + ("_" if stack == "encoderblock" else "/")
    return {f"{before}{one}{i}/{n}": shape for i in range(layers) for n, shape in shapes.items()}


def _transformer(before: str, scan: bool) -> dict[str, tuple]:
    block = (
        _norm("LayerNorm_0")
        | _attention("MultiHeadDotProductAttention_0")
        | _norm("LayerNorm_1")
        | _mlp("MlpBlock_0")
    )
    return _stacked(block, before, "encoderblock", DEPTH, scan) | _norm(before + "encoder_norm")


def _map_head() -> dict[str, tuple]:
    head = {"probe": (1, 1, WIDTH)} | _attention("MultiHeadDotProductAttention_0")
    head |= _norm("LayerNorm_0") | _mlp("MlpBlock_0")
    return {f"MAPHead_0/{name}": shape for name, shape in head.items()}


def vit(scan: bool, pooled: bool) -> dict[str, tuple]:
    """Shapes of models/vit.py."""
    shapes = _dense("embedding", (PATCH, PATCH, 3), (WIDTH,))
    shapes |= {"pos_embedding": (1, (SIDE // PATCH) ** 2, WIDTH)}
    return shapes | _transformer("Transformer/", scan) | (_map_head() if pooled else {})


def siglip(scan: bool) -> dict[str, tuple]:
    """Shapes of two towers, temperature and bias."""
    text = {"Embed_0/embedding": (VOCAB, WIDTH), "pos_embedding": (1, 5, WIDTH)}
    text |= _transformer("Encoder_0/", scan) | _map_head() | _dense("head", (WIDTH,), (WIDTH,))
    towers = {f"img/{n}": s for n, s in vit(scan, pooled=True).items()}
    return towers | {f"txt/{n}": s for n, s in text.items()} | {"t": (1,), "b": (1,)}


def gemma(scan: bool, heads: int, kv_heads: int, post_norms: bool) -> dict[str, tuple]:
    """Shapes of models/ppp/gemma.py."""
    width = GEMMA_WIDTH
    block = {
        "attn/attn_vec_einsum/w": (heads, HEAD_DIM, width),
        "mlp/gating_einsum": (2, width, GEMMA_MLP),
        "mlp/linear": (GEMMA_MLP, width),
        "pre_attention_norm/scale": (width,),
        "pre_ffw_norm/scale": (width,),
    }
    if heads == kv_heads:
        block |= {"attn/qkv_einsum/w": (3, heads, width, HEAD_DIM)}
    else:
        block |= {"attn/q_einsum/w": (heads, width, HEAD_DIM)}
        block |= {"attn/kv_einsum/w": (2, kv_heads, width, HEAD_DIM)}
    if post_norms:
        block |= {"post_attention_norm/scale": (width,), "post_ffw_norm/scale": (width,)}
    shapes = {"embedder/input_embedding": (VOCAB, width), "final_norm/scale": (width,)}
    return shapes | _stacked(block, "", "layers", GEMMA_DEPTH, scan)


def paligemma(scan: bool, **fields) -> dict[str, tuple]:
    """Shapes of a ViT whose head is the connector, and a Gemma."""
    image = vit(scan, pooled=False) | _dense("head", (WIDTH,), (GEMMA_WIDTH,))
    return {f"img/{n}": s for n, s in image.items()} | {
        f"llm/{n}": s for n, s in gemma(scan, **fields).items()
    }


GEMMA = {"heads": 5, "kv_heads": 1, "post_norms": False}
GEMMA2 = {"heads": 4, "kv_heads": 2, "post_norms": True}
ALL_HEADS = {"heads": 3, "kv_heads": 3, "post_norms": False}

# Name, prefix of its names, shapes, dtype.
CASES = {
    "vit": ("", vit(scan=False, pooled=False), "float32"),
    "vit_map_scan": ("opt/target/", vit(scan=True, pooled=True), "float32"),
    "siglip": ("params/", siglip(scan=False), "float32"),
    "siglip_scan": ("params/", siglip(scan=True), "bfloat16"),
    "paligemma": ("params/", paligemma(scan=True, **GEMMA), "float32"),
    "paligemma_bfloat16": ("params/", paligemma(scan=True, **GEMMA), "bfloat16"),
    "paligemma2": ("params/", paligemma(scan=True, **GEMMA2), "float32"),
    "paligemma_7b": ("", paligemma(scan=False, **ALL_HEADS), "float32"),
}


def arrays(name: str) -> dict[str, np.ndarray]:
    """The numbers of a case by its file's names; bfloat16 as numpy saves it, two bytes untyped."""
    prefix, shapes, dtype = CASES[name]
    rng = np.random.default_rng(len(shapes))
    made = {}
    for tensor, shape in shapes.items():
        array = (0.3 * rng.normal(size=shape)).astype(np.float32)
        if dtype == "bfloat16":
            array = (array.view(np.uint32) >> 16).astype(np.uint16).view("V2")
        made[prefix + tensor] = array
    return made


def layer(arrays: dict[str, np.ndarray], before: str, stack: str, i: int) -> dict[str, np.ndarray]:
    """The parameters of one layer, stacked or not."""
    one = f"{before}{stack}{'_' if stack == 'encoderblock' else '/'}{i}/"
    found = {n.removeprefix(one): a for n, a in arrays.items() if n.startswith(one)}
    if found:
        return found
    whole = f"{before}{stack}/"
    return {n.removeprefix(whole): a[i] for n, a in arrays.items() if n.startswith(whole)}

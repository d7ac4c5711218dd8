"""The same decoders in transformers, OpenFlamingo's blocks put before its layers. Needs torch."""

import cases
import numpy as np
import theirs
import torch
import transformers
from fusion_cases import Case, image_index, inputs

from vlm_jax.weights.families import idefics_text, open_flamingo


class GatedBlock(torch.nn.Module):
    """OpenFlamingo's block as its paper and helpers.py define it; names are those of its weights.

    Text attends to the one image before it, an image's own placeholder included, and adds zero
    where there is none; no linear layer has a bias.
    """

    def __init__(self, width: int, visual: int, heads: int, head_dim: int, eps: float):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.attn = torch.nn.ModuleDict(
            {
                "norm": torch.nn.LayerNorm(width, eps),
                "to_q": torch.nn.Linear(width, inner, bias=False),
                "to_kv": torch.nn.Linear(visual, 2 * inner, bias=False),
                "to_out": torch.nn.Linear(inner, width, bias=False),
            }
        )
        self.ff = torch.nn.Sequential(
            torch.nn.LayerNorm(width, eps),
            torch.nn.Linear(width, 4 * width, bias=False),
            torch.nn.GELU(),
            torch.nn.Linear(4 * width, width, bias=False),
        )
        self.attn_gate = torch.nn.Parameter(torch.zeros(1))
        self.ff_gate = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, visual, media):
        images, queries = visual.shape[1:3]
        split = lambda y: y.unflatten(-1, (self.heads, self.head_dim))  # noqa: E731
        query = split(self.attn["to_q"](self.attn["norm"](x)))
        keys, values = self.attn["to_kv"](visual).chunk(2, dim=-1)
        scores = torch.einsum("bthk,bnqhk->bhtnq", query, split(keys)) / self.head_dim**0.5
        time = media.cumsum(dim=1)[:, None, :, None, None]
        mine = time == torch.arange(1, images + 1)[:, None]
        scores = scores.masked_fill(~mine, -1e30)
        weights = scores.flatten(-2).softmax(dim=-1).unflatten(-1, (images, queries))
        weights = weights * (time > 0)
        seen = torch.einsum("bhtnq,bnqhk->bthk", weights, split(values)).flatten(-2)
        x = x + self.attn_gate.tanh() * self.attn["to_out"](seen)
        return x + self.ff_gate.tanh() * self.ff(x)


def compare(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Their logits, weights and gradients of the logits' weighted sum; "visual" is among them."""
    tokens, visual, media = (torch.from_numpy(x) for x in inputs(case))
    visual.requires_grad_()
    module, call = _idefics(case) if case.family == "idefics" else _flamingo(case)
    _randomise(module)
    logits = call(tokens.long(), visual, media)
    (logits * torch.from_numpy(cases.cotangent(tuple(logits.shape)))).sum().backward()
    named = lambda arrays: _named(case, arrays)  # noqa: E731
    found = [(n, p) for n, p in module.named_parameters() if p.grad is not None]
    weights = named({name: p.detach().numpy() for name, p in found})
    gradients = named({name: p.grad.numpy() for name, p in found})
    return logits.detach().numpy(), weights, gradients | {"visual": visual.grad.numpy()}


def _randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Every weight random, so that none hides a mistake."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.3 * rng.normal(size=parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(noise) + (parameter == 1).all())


def _named(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return arrays if case.family == "idefics" else theirs._named(case.plain, arrays)


def idefics_config(case: Case) -> transformers.IdeficsConfig:
    """Theirs, of what `write` says, with a vision tower that the text never reaches."""
    hf = idefics_text.write(case.decoder, case.fusion)
    width = hf["vision_config"]["embed_dim"]
    vision = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 2}
    return transformers.IdeficsConfig(
        **hf | {"vision_config": {"embed_dim": width, "image_size": 14, **vision}},
        use_resampler=True,
        perceiver_config={"resampler_depth": 1, "resampler_n_latents": 1, "use_resampler": True},
        freeze_text_layers=False,
        freeze_vision_layers=False,
        pad_token_id=None,
        attn_implementation="eager",
    )


def _idefics(case: Case):
    module = transformers.IdeficsForVisionText2Text(idefics_config(case)).float().eval()

    def call(tokens, visual, media):
        index = torch.from_numpy(image_index(media.numpy())).long()
        one_hot = index[..., None] == torch.arange(visual.shape[1])
        return module(
            input_ids=tokens, perceiver_embeddings=visual, image_attention_mask=one_hot.long()
        ).logits

    return module, call


def _flamingo(case: Case):
    """Their decoder, and a block of ours before each layer that has one."""
    language = theirs.make(case.plain)
    fusion, prefix = case.fusion, open_flamingo.LAYERS[case.family]
    layers = language.get_submodule(prefix)
    state = {}
    for place in fusion.places(case.decoder.depth):
        sizes = case.decoder.width, fusion.width, fusion.heads, fusion.head_dim, fusion.norm_eps
        block = GatedBlock(*sizes)

        def before(layer, args, kwargs, block=block):
            return (block(args[0], *state["seen"]), *args[1:]), kwargs

        layers[place].register_forward_pre_hook(before, with_kwargs=True)
        state[place] = block

    class Whole(torch.nn.Module):
        """Named as in OpenFlamingo's checkpoints: the blocks; as in transformers: the rest."""

        def named_parameters(self):
            yield from language.named_parameters()
            for place in fusion.places(case.decoder.depth):
                name = f"lang_encoder.{prefix}.{place}.gated_cross_attn_layer."
                yield from ((name + n, p) for n, p in state[place].named_parameters())

        def parameters(self):
            return (parameter for _, parameter in self.named_parameters())

    def call(tokens, visual, media):
        state["seen"] = visual, media
        return language(tokens).logits

    return Whole(), call

"""BLIP-2's first stage: its three losses and every gradient, beside LAVIS's loss restated in torch
over the modules of transformers' class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import published  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from vlm_jax import config as c  # noqa: E402
from vlm_jax.batch import Batch  # noqa: E402
from vlm_jax.models import params  # noqa: E402
from vlm_jax.parallel import mesh as meshes  # noqa: E402
from vlm_jax.training import matching, objectives  # noqa: E402
from vlm_jax.weights import checking, registry, tables  # noqa: E402

pytestmark = pytest.mark.slow

COUNT, LENGTH, START, SMOOTHING = 4, 7, 19, 0.1
IMAGES, TEXTS = [2, 3, 1, 0], [1, 0, 3, 2]  # the negative of each text, and of each image


class Lavis(torch.nn.Module):
    """What LAVIS's Blip2Qformer has beside transformers' class, and its forward pass."""

    def __init__(self, base: torch.nn.Module, eps: float):
        super().__init__()
        width = base.config.qformer_config.hidden_size
        self.base = base
        self.temp = torch.nn.Parameter(torch.tensor(0.3))
        self.dense = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width, eps=eps)
        self.bias = torch.nn.Parameter(torch.randn(base.config.qformer_config.vocab_size))

    def states(self, tokens, queries, visible, seen):
        """The Q-Former's: `visible` [n, T, T] says who sees whom."""
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
        return self.base.qformer(
            query_embeds=self.base.embeddings(input_ids=tokens, query_embeds=queries),
            query_length=0 if queries is None else queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=None if seen is None else torch.ones(seen.shape[:2]),
        ).last_hidden_state

    def forward(self, pixels, tokens, there):
        base, n = self.base, len(pixels)
        seen = base.vision_model(pixels)[0]
        queries = base.query_tokens.expand(n, -1, -1)
        q = queries.shape[1]
        alone = torch.ones(n, q, q, dtype=torch.bool)
        images = F.normalize(
            base.vision_projection(self.states(None, queries, alone, seen)), dim=-1
        )
        text = there[:, None, :].expand(n, LENGTH, LENGTH)
        texts = F.normalize(
            base.text_projection(self.states(tokens, None, text, None)[:, 0]), dim=-1
        )
        to_text = torch.einsum("iqe,je->ijq", images, texts).max(-1).values / self.temp
        targets = torch.arange(n)
        alike = [
            F.cross_entropy(x, targets, label_smoothing=SMOOTHING) for x in (to_text, to_text.T)
        ]

        ids = torch.cat([tokens, tokens, tokens[TEXTS]])
        marks = torch.cat([there, there, there[TEXTS]])
        shown = torch.cat([seen, seen[IMAGES], seen])
        marks = torch.cat([torch.ones(3 * n, q, dtype=torch.bool), marks], 1)
        both = marks[:, None].expand(-1, q + LENGTH, -1)
        states = self.states(ids, queries.repeat(3, 1, 1), both, shown)
        logits = base.itm_head(states[:, :q]).mean(1)
        labels = torch.cat([torch.ones(n), torch.zeros(2 * n)]).long()
        match = F.cross_entropy(logits, labels)

        begun = tokens.clone()
        begun[:, 0] = START
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        multimodal = torch.zeros(n, q + LENGTH, q + LENGTH, dtype=torch.bool)
        multimodal[:, :, :q] = True
        multimodal[:, q:, q:] = causal & there[:, None]
        states = self.states(begun, queries, multimodal, seen)[:, q:]
        activation = base.qformer.encoder.layer[0].intermediate.intermediate_act_fn
        states = self.norm(activation(self.dense(states)))
        scores = states @ base.embeddings.word_embeddings.weight.T + self.bias
        labels = begun.masked_fill(~there, -100)[:, 1:]
        told = F.cross_entropy(
            scores[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=SMOOTHING
        )
        return (alike[0] + alike[1]) / 2, match, told, logits


@pytest.mark.parametrize("devices", [1, 4])
def test_losses_and_gradients_are_lavis(devices):
    case = published.CASES["blip_2_retrieval"]
    base = published.make(case, seed=2)
    torch.manual_seed(0)
    theirs = Lavis(base, case.config.qformer_config.layer_norm_eps)
    rng = np.random.default_rng(4)
    with torch.no_grad():
        theirs.norm.weight.add_(0.3 * torch.randn(theirs.norm.weight.shape))
    pixels = rng.normal(size=(COUNT, 3, 12, 12)).astype(np.float32)
    there = np.arange(LENGTH) < np.array([[7], [3], [5], [4]])
    tokens = np.where(there, rng.integers(1, START, (COUNT, LENGTH)), 0)
    *parts, logits = theirs(*map(torch.from_numpy, (pixels, tokens, there)))
    sum(parts).backward()

    hf = case.config.to_dict() | {"architectures": ["Blip2ForImageTextRetrieval"]}
    family = registry.family(registry.kind_of(hf))
    bare = checking.exact(family.read(hf))
    heads = dataclasses.replace(
        bare.text, length=LENGTH, temperature=0.3, start=START, generates=True
    )
    model = dataclasses.replace(bare, text=heads)
    arrays = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": there.astype(int)}
    images = family.inputs(bare, hf, arrays).images
    batch = Batch(
        tokens=tokens.astype(np.int32),
        segments=there.astype(np.int32),
        positions=np.tile(np.arange(LENGTH, dtype=np.int32), (COUNT, 1)),
        loss_weights=(there & (np.arange(LENGTH) > 0)).astype(np.float32),
        blocks=np.zeros((COUNT, LENGTH), np.int32),
        visual_index=np.full((COUNT, LENGTH), -1, np.int32),
        image_index=np.full((COUNT, LENGTH), -1, np.int32),
        image_texts=np.zeros((COUNT, 1, 1), np.int32),
        images=images,
    )

    def given(*_):
        return jnp.asarray(IMAGES), jnp.asarray(TEXTS)

    def loss(leaves, batch):
        vlm = params.build(model, leaves)
        return matching.losses(vlm, batch, SMOOTHING, objectives.next_token, draw=given)

    leaves = _leaves(family, bare, model, theirs, lambda p: p)
    mesh = meshes.make(c.Parallel(data=-1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves, batch)
    found = [
        sums[f"{name}nll"] / sums[f"{name}{count}"]
        for name, count in (("", "weight"), ("matching_", "pairs"))
    ]
    np.testing.assert_allclose(found, [float(p.detach()) for p in parts[:2]], rtol=1e-5)
    np.testing.assert_allclose(total, float(sum(parts).detach()), rtol=1e-5)
    right = (logits.argmax(1) == torch.tensor([1] * COUNT + [0] * 2 * COUNT)).sum()
    assert sums["matching_correct"] == right.item()
    wanted = _leaves(family, bare, model, theirs, lambda p: p.grad)
    assert wanted.keys() == gradient.keys()
    for path, slope in wanted.items():
        # Key biases have rounding alone, see `test_fused_gradients.py`.
        same = path.replace("key", "query") if path.endswith("bias") else path
        error = np.linalg.norm(gradient[path] - slope)
        assert error <= 1e-4 * np.linalg.norm(wanted[same]), path


def _leaves(family, bare, model, theirs, of) -> dict[str, np.ndarray]:
    """Our leaves of their parameters, or of what else `of` says of one."""
    shapes = {path: leaf.shape for path, leaf in params.abstract(bare).items()}
    named = {n: of(p) for n, p in theirs.base.named_parameters()}
    named = {n: p.detach().numpy() for n, p in named.items() if p is not None}
    own = {
        "text/temperature": theirs.temp,
        "text/transform/kernel": theirs.dense.weight,
        "text/transform/bias": theirs.dense.bias,
        "text/transform_norm/scale": theirs.norm.weight,
        "text/transform_norm/bias": theirs.norm.bias,
        "text/output_bias": theirs.bias,
    }
    own = {path: of(p).detach().numpy() for path, p in own.items()}
    own["text/transform/kernel"] = own["text/transform/kernel"].T
    return tables.gather(family.rows(bare), shapes, named) | own

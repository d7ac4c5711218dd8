"""The same connectors in transformers: outputs and gradients to compare with. Needs torch."""

import types

import numpy as np
import torch
import transformers
from connector_cases import Case
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector


def compare(case: Case, fed: dict[str, np.ndarray], cotangent):
    """Their output, and weights and gradients of its weighted sum by their names, in numpy.

    Args:
      case: its family's last name says which model.
      fed: features, mask and texts.
      cotangent: shape -> what the output is weighted with.
    """
    module = make(case)
    output = module(**{name: torch.from_numpy(np.asarray(x)) for name, x in fed.items()})
    (output * torch.from_numpy(cotangent(tuple(output.shape)))).sum().backward()
    named = dict(module.named_parameters())
    weights = {name: p.detach().numpy() for name, p in named.items()}
    return output.detach().numpy(), weights, {name: p.grad.numpy() for name, p in named.items()}


def make(case: Case, seed: int = 0) -> torch.nn.Module:
    """Their connector of the case's sizes; every weight random, so that none hides a mistake."""
    family = case.family.__name__.rpartition(".")[2]
    module = MAKERS[family](case, case.family.write(case.preset))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.3 * rng.normal(size=parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(noise) + (parameter == 1).all())
    return module.float().eval()


class Part(torch.nn.Module):
    """Parts of a model under the names that they have there, called by a function of ours."""

    def __init__(self, call, **parts):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, **fed):
        return self.call(self, **fed)


def _sizes(case: Case) -> types.SimpleNamespace:
    """What projectors read of a config, as far as no family's `write` speaks of it."""
    rows, _, width = case.features[0]
    return types.SimpleNamespace(
        vision_config=types.SimpleNamespace(
            hidden_size=width, projection_dim=case.width, image_size=4 * rows, patch_size=4
        ),
        text_config=types.SimpleNamespace(hidden_size=case.width),
        vision_feature_layer=-2,
    )


def _filled(case: Case, fields: dict) -> types.SimpleNamespace:
    config = _sizes(case)
    for name, value in fields.items():
        if isinstance(value, dict):
            vars(getattr(config, name)).update(value)
        else:
            setattr(config, name, value)
    return config


def _projector(make):
    def made(case: Case, fields: dict) -> torch.nn.Module:
        call = lambda part, x0: part.multi_modal_projector(x0)  # noqa: E731
        return Part(call, multi_modal_projector=make(_filled(case, fields)))

    return made


def _llava_next(case: Case, fields: dict) -> torch.nn.Module:
    def call(part, x0):
        packed = transformers.LlavaNextModel.pack_image_features
        tokens = part.multi_modal_projector(x0)
        found, _ = packed(None, list(tokens[:, None]), None, "default", part.image_newline)
        return torch.stack(found)

    newline = torch.nn.Parameter(torch.zeros(case.width))
    projector = LlavaNextMultiModalProjector(_filled(case, fields))
    return Part(call, multi_modal_projector=projector, image_newline=newline)


def _idefics3(case: Case, fields: dict) -> torch.nn.Module:
    connector = Idefics3Connector(_filled(case, fields))
    return Part(lambda part, x0: part.connector(x0), connector=connector)


def _idefics2(case: Case, fields: dict) -> torch.nn.Module:
    config = transformers.Idefics2Config(
        vision_config={"hidden_size": case.features[0][2]},
        text_config=fields["text_config"] | {"model_type": "mistral", "num_attention_heads": 1},
        perceiver_config=fields["perceiver_config"],
        attn_implementation="eager",
    )

    def call(part, x0, mask0=None):
        mask = torch.ones(x0.shape[:2]) if mask0 is None else mask0.float()
        return part.connector(x0, mask)

    return Part(call, connector=Idefics2Connector(config))


def _idefics(case: Case, fields: dict) -> torch.nn.Module:
    config = transformers.IdeficsConfig(**fields)
    own = config.perceiver_config
    resampler = IdeficsPerceiverResampler(
        config,
        config.vision_config.embed_dim,
        own.resampler_depth,
        own.resampler_n_heads,
        own.resampler_head_dim,
        own.resampler_n_latents,
    )
    return Part(lambda part, x0: part.perceiver_resampler(x0), perceiver_resampler=resampler)


def _qformer(family: str):
    config_class = getattr(transformers, f"{family}QFormerConfig")
    model_class = getattr(transformers, f"{family}QFormerModel")

    def call(part, x0, mask0=None, texts=None):
        queries = part.query_tokens.expand(len(x0), -1, -1)
        fed = {"encoder_hidden_states": x0}
        if mask0 is not None:
            fed["encoder_attention_mask"] = mask0.long()
        if texts is not None:
            visible = torch.cat([torch.ones(queries.shape[:2]).long(), (texts > 0).long()], dim=1)
            fed |= {"input_ids": texts.long(), "attention_mask": visible}
        found = part.qformer(query_embeds=queries, **fed).last_hidden_state
        return part.language_projection(found[:, : queries.shape[1]])

    def make(case: Case, fields: dict) -> torch.nn.Module:
        own = fields["qformer_config"] | {"encoder_hidden_size": case.features[0][2]}
        config = config_class(**own, attn_implementation="eager")
        width = config.hidden_size
        return Part(
            call,
            query_tokens=torch.nn.Parameter(torch.zeros(1, fields["num_query_tokens"], width)),
            qformer=model_class(config),
            language_projection=torch.nn.Linear(width, case.width),
        )

    return make


MAKERS = {
    "blip_2_qformer": _qformer("Blip2"),
    "instructblip_qformer": _qformer("InstructBlip"),
    "llava_projector": _projector(LlavaMultiModalProjector),
    "llava_next_projector": _llava_next,
    "paligemma_projector": _projector(PaliGemmaMultiModalProjector),
    "gemma3_projector": _projector(Gemma3MultiModalProjector),
    "idefics3_connector": _idefics3,
    "idefics2_connector": _idefics2,
    "idefics_resampler": _idefics,
}

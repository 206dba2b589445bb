"""Imported models against transformers itself, on random weights of each architecture in odd shapes, in float32."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare, sample
from rlstab_jax.models import ModelConfig
from rlstab_jax.models.hf_config import write_model_config
from rlstab_jax.models.huggingface import export_model, import_model
from rlstab_jax.models.transformer import forward, logits_of
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh

torch = pytest.importorskip("torch", reason="the comparison with transformers needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="the comparison with transformers needs the extra `parity`")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, NEW = 37, 8
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "eos_token_id": None, "pad_token_id": None}
EXPERTS = {"num_experts_per_tok": 3, "num_experts": 7}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}
# Head widths other than d / heads, one key head, more experts than a byte counts, dense layers, tied and untied heads.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 10, "intermediate_size": 20, "moe_intermediate_size": 12, **EXPERTS}
        | {"mlp_only_layers": [0], "norm_topk_prob": True, **ROPE}),
    "qwen3_moe_300": ("Qwen3Moe", {"head_dim": 6, "intermediate_size": 20, "moe_intermediate_size": 4}
        | {"num_experts": 300, "num_experts_per_tok": 5, "norm_topk_prob": False, "tie_word_embeddings": True}
        | {"decoder_sparse_step": 2}),
    "mixtral": ("Mixtral", {"head_dim": 10, "intermediate_size": 20, "num_local_experts": 5}),
    "olmoe": ("Olmoe", {"intermediate_size": 20, "num_key_value_heads": 2, "norm_topk_prob": False, **EXPERTS}),
    "qwen3": ("Qwen3", {"head_dim": 14, "intermediate_size": 20, "tie_word_embeddings": True}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def made(case: str, tmp_path: Path) -> tuple[Any, ModelConfig, dict, Path]:
    """A model of transformers with random weights (gains too), and what we import of what it saves."""
    name, sizes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | sizes), initializer_range=0.2)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    ours, params, dtype = import_model(tmp_path / "hf", MESH)
    assert dtype == "float32"
    return model, ours, params, tmp_path / "hf"


def draw(rows: int, time: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (rows, time))


def objective(config: ModelConfig, tokens: np.ndarray, params: dict) -> tuple[jax.Array, Any]:
    """The mean log-prob of the next tokens; beside it logits and routes."""
    model, variables = tiny.model(config, experts="dense"), {"params": params}
    output = forward(model, variables, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    hidden = output.hidden.reshape(-1, config.embed_dim)
    logits = logits_of(model, variables, hidden).reshape(*tokens.shape, -1)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    routes = None if output.routing is None else output.routing.used
    return jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], -1).mean(), (logits, routes)


@every_case
def test_logits_experts_and_gradients(made: tuple[Any, ModelConfig, dict, Path]) -> None:
    model, config, params, path = made
    tokens = draw(2, 9)
    chosen: list[Any] = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2].numpy()))
    logits = model(torch.tensor(tokens)).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(-1, torch.tensor(tokens)[:, 1:, None])
    log_probs.mean().backward()

    of = jax.jit(
        jax.value_and_grad(partial(objective, config, tokens), has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    (value, (our_logits, routes)), gradient = of(params)
    np.testing.assert_allclose(our_logits, logits.detach(), atol=1e-4)
    np.testing.assert_allclose(value, log_probs.mean().detach(), atol=1e-5)
    assert len(chosen) == config.num_moe_layers
    if chosen:
        np.testing.assert_array_equal(routes, np.stack(chosen).reshape(routes.shape))

    # Gradients are saved as if they were weights, so that the import brings them into our layout.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(path.with_name("gradient"))
    _, expected, _ = import_model(path.with_name("gradient"), MESH)
    for (place, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        norm = np.linalg.norm(theirs)
        assert norm > 0, place
        assert np.linalg.norm(ours - theirs) < 1e-3 * norm, place


@pytest.mark.parametrize("case", [case for case in CASES if case != "qwen3_moe_300"])
def test_greedy_generation(made: tuple[Any, ModelConfig, dict, Path]) -> None:
    """Row by row there, in one padded batch here."""
    model, config, params, _ = made
    tokens, mask = draw(3, 6), np.arange(6) >= np.array([[0], [2], [5]])
    rollout = sample(
        tiny.model(config), prepare(params, tiny.FLOAT32), jnp.asarray(tokens, jnp.int32), jnp.asarray(mask),
        tiny.keys(3, 1), tiny.sampling(temperature=np.float32(0), stop_ids=np.zeros(0, np.int32)),
        response_length=NEW,
    )  # fmt: skip
    for row, real, ours in zip(tokens, mask, np.asarray(rollout.tokens)[:, 6:], strict=True):
        prompt = torch.tensor(row[real])[None]
        theirs = model.generate(prompt, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
        np.testing.assert_array_equal(ours, theirs[0, -NEW:].numpy())


@every_case
@pytest.mark.parametrize("of_source", [True, False])
def test_an_export_is_what_transformers_loads(
    made: tuple[Any, ModelConfig, dict, Path], of_source: bool, tmp_path: Path
) -> None:
    """With the source's config.json, and with one that is written from our sizes alone."""
    model, config, params, path = made
    base = json.loads((path / "config.json").read_text()) if of_source else None
    out = tmp_path / "exported"
    out.mkdir()
    files = export_model(config, params, out, "float32", shard_bytes=10_000)
    assert len(files) > 3
    (out / "config.json").write_text(json.dumps(write_model_config(config, "float32", base)))
    loaded, said = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(said.values()), said
    assert type(loaded) is type(model)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    tokens = torch.tensor(draw(2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_stacked_experts_are_the_same_checkpoint(made: tuple[Any, ModelConfig, dict, Path], tmp_path: Path) -> None:
    """transformers 5 can save the experts of a layer as one tensor."""
    model, config, params, _ = made
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert b"experts.gate_up_proj" in (tmp_path / "stacked" / "model.safetensors").read_bytes()
    again, stacked, _ = import_model(tmp_path / "stacked", MESH)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, stacked)

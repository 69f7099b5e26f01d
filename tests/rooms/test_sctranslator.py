"""scTranslator: the published network to the last digit that counts, there and back, and tunable like any other.

Shapes: B cells, G genes, P proteins.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from metier.adapt import adapt
from metier.core import ModelError, RecipeError
from metier.models import pickled
from metier.models import sctranslator as room
from metier.models.sctranslator import ScTranslator, Shape, from_original, to_original
from metier.recipe import FreezeMethod, LoRAMethod

FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "sctranslator"
SMALL = Shape(dim=8, genes=30, proteins=6, bridge=14, vocabulary=50, heads=2, head_dim=4, features=12)
published = pytest.mark.skipif(not FIXTURE.is_dir(), reason="the published network is not at hand")


@pytest.fixture(scope="module")
def original():
    return pickled.read(FIXTURE / "sct_random.pt").tensors


def small(**settings):
    torch.manual_seed(0)
    return ScTranslator(SMALL, **settings)


def cells(count=3):
    dice = torch.Generator().manual_seed(1)
    keep_BG = torch.rand(count, SMALL.genes, generator=dice) > 0.2
    return (
        torch.rand(count, SMALL.genes, generator=dice),
        torch.randint(1, 50, (count, SMALL.genes), generator=dice) * keep_BG,
        torch.randint(1, 50, (count, SMALL.proteins), generator=dice),
        keep_BG,
        torch.ones(count, SMALL.proteins, dtype=torch.bool),
    )


@published
@torch.no_grad()
def test_every_stage_is_the_published_one(original):
    network = from_original(original)
    wanted = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "forward_reference.npz").items()}
    seen = {}
    first = network.encoder.blocks[0]
    first.register_forward_hook(lambda _, given, out: seen.update(emb=given[0], enc_l0=out))
    first.feed_forward_norm.register_forward_hook(lambda _, given, __: seen.update(enc_l0_attn=given[0]))
    network.encoder.register_forward_hook(lambda *found: seen.update(encodings=found[-1]))
    network.bridge.register_forward_hook(lambda *found: seen.update(translator_out=found[-1]))
    seen["out"] = network(*(wanted[name] for name in ("rna", "rna_id", "pro_id", "rna_mask", "pro_mask")))
    for name, found in seen.items():
        assert (found - wanted[name]).abs().max() < 1e-5, name
    assert len(seen) == 6


@published
def test_sizes_are_read_off_and_the_original_layout_comes_back_bit_equal(original):
    network = from_original({f"module.{name}": tensor for name, tensor in original.items()})
    assert network.shape == Shape.of(32, 2000, 100)
    back = to_original(network)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


@published
def test_the_tutorials_adapter_on_the_published_network(original):
    with pytest.raises(RecipeError, match="did you mean to_q"):
        adapt(from_original(original), LoRAMethod(targets=("q_proj", "v_proj")))
    adapted = adapt(from_original(original), LoRAMethod(rank=8, alpha=32, dropout=0.1, targets=("to_q", "to_v")))
    assert adapted.moved == 34_816
    assert f"{adapted.moved / (adapted.total - adapted.moved):.2%}" in {"0.52%", "0.53%"}


@torch.no_grad()
def test_attention_is_the_formula_in_double_precision():
    attention = room.Attention(SMALL).double()
    x_BND, keep_BN = torch.randn(2, 7, 8, dtype=torch.float64), torch.rand(2, 7) > 0.3
    q, k, v = (layer(x_BND).view(2, 7, 2, 4) for layer in (attention.to_q, attention.to_k, attention.to_v))
    wanted = torch.zeros(2, 7, 2, 4, dtype=torch.float64)
    for b, h in np.ndindex(2, 2):

        def features(x_NK, most):
            dash_NF = 4**-0.25 * x_NK @ attention.projection.T.double()
            half_N1 = (x_NK**2).sum(-1, keepdim=True) / 2 * 4**-0.5
            return 12**-0.5 * (torch.exp(dash_NF - half_N1 - most(dash_NF)) + 1e-4)

        q_NF = features(q[b, :, h], lambda dash: dash.amax(-1, keepdim=True))
        k_NF = features(k[b, :, h], torch.amax)
        weight_NM = q_NF @ k_NF.T
        wanted[b, :, h] = (weight_NM @ (v[b, :, h] * keep_BN[b, :, None])) / weight_NM.sum(-1, keepdim=True)
    found = attention(x_BND, keep_BN)
    assert torch.allclose(found, attention.to_out(wanted.flatten(2)), atol=1e-12)


@torch.no_grad()
def test_random_features_estimate_the_softmax_kernel():
    directions_FK = room.orthogonal_features(4096, 8, torch.Generator().manual_seed(0)).double()
    assert torch.allclose(
        directions_FK[:8] @ directions_FK[:8].T, torch.diag(directions_FK[:8].square().sum(1)), atol=1e-5
    )
    q_K, k_K = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 2
    estimate = (torch.exp(directions_FK @ q_K - q_K @ q_K / 2) * torch.exp(directions_FK @ k_K - k_K @ k_K / 2)).mean()
    assert float(estimate) == pytest.approx(float(torch.exp(q_K @ k_K)), rel=0.05)


def test_training_goes_backward_and_every_used_weight_moves():
    network = small(dropout=0.0).train()
    for _ in range(2):
        network(*cells()).square().mean().backward()
    silent = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert silent == {
        "encoder.to_out.weight",
        "encoder.to_out.bias",
        "decoder.to_vector.weight",
        "decoder.to_vector.bias",
    }


def test_what_is_padding_gives_no_value():
    network, (rna, gene, protein, keep, keep_protein) = small().eval(), cells()
    with torch.no_grad():
        with_values = network.encoder.blocks[0].attention.to_v
        before = network(rna, gene, protein, keep, keep_protein)
        with_values.weight.mul_(1.0)
        assert torch.equal(before, network(rna, gene, protein, keep, keep_protein))
        assert not torch.equal(before, network(rna, gene, protein, None, keep_protein))


def test_features_are_redrawn_on_time_and_the_same_after_a_stop():
    whole, cut = small(redraw_interval=3), small(redraw_interval=3)
    first = whole.encoder.blocks[0].attention.projection.clone()
    seen = []
    for _ in range(9):
        whole(*cells())
        seen.append(whole.encoder.blocks[0].attention.projection.clone())
    assert torch.equal(seen[2], first)
    assert not torch.equal(seen[3], first)
    assert torch.equal(seen[6], seen[3])
    assert not torch.equal(seen[7], seen[3])
    for _ in range(5):
        cut(*cells())
    resumed = small(redraw_interval=3)
    resumed.load_state_dict(cut.state_dict())
    for _ in range(4):
        resumed(*cells())
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    whole.eval()(*cells())
    assert torch.equal(whole.encoder.blocks[0].attention.projection, seen[-1])
    fixed = small(redraw_interval=0)
    fixed(*cells())
    assert int(fixed.encoder.calls_since_redraw) == 0


@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same_bits(tmp_path):
    network = small(dropout=0.3, redraw_interval=7, seed=5)
    network.draws += 2
    room.save(network, tmp_path)
    found = room.load(tmp_path)
    assert (found.shape, found.redraw_interval, found.seed, found.bridge.dropout.p) == (SMALL, 7, 5, 0.3)
    assert torch.equal(found(*cells()), network.eval()(*cells()))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json"):
        room.load(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_told_tensor_by_tensor():
    whole = to_original(small())
    with pytest.raises(ModelError, match="no scTranslator"):
        from_original({"w": torch.ones(1)})
    name = "dec.performer.net.layers.1.1.norm.bias"
    changed = {**whole, "enc.extra": torch.ones(1), "dec.to_out.bias": torch.ones(2)}
    del changed[name]
    with pytest.raises(ModelError) as caught:
        from_original(changed)
    assert [fault.where for fault in caught.value.faults] == [
        "decoder.blocks.1.feed_forward_norm.bias", "encoder.extra", "decoder.to_out.bias",
    ]  # fmt: skip


def test_more_genes_or_proteins_than_the_bridge_holds_are_refused_with_the_counts():
    room.check_panels(SMALL, genes=30, proteins=6)
    with pytest.raises(ModelError) as caught:
        room.check_panels(SMALL, genes=4000, proteins=7)
    assert "4,000 genes, but the network holds 30" in str(caught.value)
    assert len(caught.value.faults) == 2


def test_the_last_blocks_alone_can_move():
    network = small()
    adapted = adapt(network, FreezeMethod(blocks=1))
    assert 0 < adapted.moved < adapted.total

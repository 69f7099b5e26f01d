"""scTranslator: the published network to the last digit that counts, there and back, and tunable like any other.

Shapes: B cells, G genes, P proteins.
"""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from metier.adapt import adapt
from metier.core import ModelError, RecipeError, StorageError
from metier.core.panel import Panel
from metier.models import pickled
from metier.models import sctranslator as room
from metier.models.sctranslator import ScTranslator, Shape, favor, from_original, to_original
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


def plain_features(x, projection, over):
    """Positive random features with every factor in its place."""
    dash = x.shape[-1] ** -0.25 * x @ projection.T
    diagonal = (x**2).sum(-1, keepdim=True) / 2 * x.shape[-1] ** -0.5
    return projection.shape[0] ** -0.5 * (torch.exp(dash - diagonal - dash.amax(over, keepdim=True).detach()) + 1e-4)


def plain_attention(attention, x, keep):
    """The published attention as a matrix of weights, token by token."""
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = plain_features(q, attention.projection, -1) @ plain_features(k, attention.projection, (-1, -2)).mT
    mixed = weights @ (v * keep[:, None, :, None]) / weights.sum(-1, keepdim=True)
    return attention.to_out(mixed.transpose(1, 2).flatten(2))


def plain_network(network, rna, gene, protein, keep_gene, keep_protein):
    """The published network, restated without any shortcut."""

    def stack(blocks, x, keep):
        for block in blocks:
            x = x + plain_attention(block.attention, block.attention_norm(x), keep)
            feed = block.feed_forward
            x = x + feed.contract(F.gelu(feed.expand(block.feed_forward_norm(x))))
        return x

    x = network.encoder.to_vector(rna[..., None]) + network.encoder.identity(gene)
    x = network.bridge(stack(network.encoder.blocks, x, keep_gene)) + network.decoder.identity(protein)
    return network.decoder.to_out(stack(network.decoder.blocks, x, keep_protein)).squeeze(-1)


def gradients(forward, network, given):
    network.zero_grad()
    (forward(*given) * torch.linspace(-1, 1, SMALL.proteins)).sum().backward()
    return {
        name: parameter.grad.double() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


def sharpened():
    """Weights far from their first draw, so that no exponential is near 1."""
    network = small(dropout=0.0, redraw_interval=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return network


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("part", "count"), [(1, 3), (1 << 19, 3), (1 << 19, 4)])
def test_outputs_and_gradients_are_the_plain_formulas(part, count, monkeypatch, two_threads):
    monkeypatch.setitem(favor.PART, "cpu", part)
    single, double = sharpened(), sharpened().double()
    assert single.encoder._apart(torch.zeros(count, 1, 8)) == (count == 4)
    rna, *rest = cells(count)
    wanted = gradients(lambda *given: plain_network(double, *given), double, (rna.double(), *rest))
    exact = gradients(double, double, (rna.double(), *rest))
    found = gradients(single, single, (rna, *rest))
    assert found.keys() == exact.keys() == wanted.keys()
    whole = torch.cat([grad.flatten() for grad in wanted.values()]).norm()
    for name, grad in wanted.items():
        # The bias of the keys shifts all exponents alike: its gradient is nearly zero and measured against the whole.
        size = max(float(grad.norm()), 1e-3 * float(whole))
        assert (exact[name] - grad).norm() < 1e-11 * size, name
        assert (found[name] - grad).norm() < 1e-5 * size, name
    with torch.no_grad():
        far = plain_network(double, rna.double(), *rest) - double(rna.double(), *rest)
    assert far.abs().max() < 1e-12


def test_threads_change_no_bit_of_the_attention_and_are_left_as_they_were(monkeypatch):
    monkeypatch.setitem(favor.PART, "cpu", 1)
    before, found = torch.get_num_threads(), []
    projection = room.orthogonal_features(266, 64, torch.Generator().manual_seed(0))
    drawn = torch.randn(3, 2, 4, 50, 64, generator=torch.Generator().manual_seed(0))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            q_k_v = [x.clone().requires_grad_() for x in drawn]
            room.Favor.apply(*q_k_v, torch.ones(50, 1), projection).square().sum().backward()
            found.append(torch.stack([x.grad for x in q_k_v]))
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_adapters_learn_the_same_cell_by_cell(two_threads, monkeypatch):
    network = adapt(small(dropout=0.0), LoRAMethod(rank=2, alpha=4, dropout=0.0, targets=("to_q", "to_v"))).module
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.1 * ("lora_B" in name))
    found = gradients(network, network, cells(4))
    monkeypatch.setattr(room.Stack, "_apart", lambda *_: False)
    wanted = gradients(network, network, cells(4))
    assert len(found) == 16
    assert all("lora" in name and (found[name] - grad).norm() < 1e-5 * grad.norm() for name, grad in wanted.items())


def test_what_draws_in_order_is_not_taken_apart(two_threads):
    stack, four = small().encoder, torch.zeros(4, 1, 8)
    assert stack._apart(four)
    assert not stack._apart(four[:3])
    with torch.no_grad():
        assert not stack._apart(four)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not stack._apart(four)
    stack.blocks[0].attention.to_q = torch.nn.Sequential(stack.blocks[0].attention.to_q, torch.nn.Dropout(0.1))
    assert not stack._apart(four)
    assert stack.eval()._apart(four)


def test_half_width_around_the_attention_leaves_its_exponents_alone():
    network = sharpened()
    whole = network(*cells())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(*cells())
        mixed.float().sum().backward()
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - whole).norm() < 0.1 * whole.norm()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_narrow_panels_are_padded_as_published_without_the_work():
    network = sharpened().double()
    rna, gene, protein, keep, _ = cells()
    rna, gene, keep, protein = rna[:, :11].double(), gene[:, :11], keep[:, :11], protein[:, :4]
    by_hand = (
        F.pad(rna, (0, 19)), F.pad(gene, (0, 19)), F.pad(protein, (0, 2)), F.pad(keep, (0, 19)),
        torch.tensor([[True] * 4 + [False] * 2] * 3),
    )  # fmt: skip
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    narrow, wide = network(rna, gene, protein, keep), network(*by_hand)
    assert seen == [12, 30]
    assert narrow.shape == (3, 4)
    assert torch.allclose(narrow, wide[:, :4], atol=1e-12)
    found = gradients(lambda *given: F.pad(network(*given), (0, 2)), network, (rna, gene, protein, keep))
    wanted = gradients(lambda *given: F.pad(network(*given)[:, :4], (0, 2)), network, by_hand)
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-11), name
    with pytest.raises(ModelError, match="31 genes, but the network holds 30"):
        network(torch.rand(1, 31), torch.ones(1, 31, dtype=torch.long), protein[:1])


@pytest.mark.parametrize("fused", [False, True])
def test_training_the_rows_in_use_is_training_them_all_to_the_bit(fused):
    whole = small(dropout=0.0, redraw_interval=2)
    start = copy.deepcopy(whole)
    batches = [cells(count) for count in (2, 3, 4, 2, 3)]
    few = whole.restricted(torch.cat([ids.flatten() for cell in batches for ids in cell[1:3]]).tolist())
    assert len(few.encoder.identity.weight) < SMALL.vocabulary
    for network in (whole, few):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01, amsgrad=True, fused=fused)
        for given in batches:
            optimizer.zero_grad()
            network(*given).square().mean().backward()
            optimizer.step()
    merged = few.merged_into(start)
    assert merged is start
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_rows_that_were_left_out_are_missed_by_name(tmp_path):
    whole = small()
    few = whole.restricted([3, 4])
    one = torch.tensor([[3, 4]])
    assert torch.equal(few(torch.rand(1, 2), one, one).isfinite(), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ModelError, match="1 ids were left out of the rows in use: 9"):
        few(torch.rand(1, 2), torch.tensor([[3, 9]]), one)
    with pytest.raises(ModelError, match=r"merged_into"):
        room.save(few, tmp_path)
    with pytest.raises(ModelError, match=r"merged_into"):
        room.export_original(few, tmp_path / "there.pt")
    with pytest.raises(ModelError, match="none of the network's: 50"):
        whole.restricted([50])
    with pytest.raises(ModelError, match="other sizes"):
        few.merged_into(ScTranslator(dataclasses.replace(SMALL, genes=9)))


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


@published
@torch.no_grad()
def test_every_layout_is_read_as_the_same_network(original, tmp_path):
    wanted = to_original(from_original(original))
    torch.save(original, tmp_path / "state.bin")
    torch.save({f"module.{name}": tensor for name, tensor in original.items()}, tmp_path / "parallel.pth")
    torch.save({"net": original, "optimizer": {}, "scheduler": {}, "epoch": 3}, tmp_path / "checkpoint.pt")
    room.save(from_original(original), tmp_path / "ours")
    room.export_original(from_original(original), tmp_path / "new" / "exported.pt")
    layouts = (
        FIXTURE / "sct_random.pt", FIXTURE / "sct_random_state_dict.safetensors", tmp_path / "state.bin",
        tmp_path / "parallel.pth", tmp_path / "checkpoint.pt", tmp_path / "ours", tmp_path / "ours" / room.WEIGHTS,
        tmp_path / "new" / "exported.pt",
    )  # fmt: skip
    for path in layouts:
        network = room.read(path)
        assert not network.training
        assert network.shape == Shape.of(32, 2000, 100)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in to_original(network).items()), path
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["exported.pt"]


@published
def test_what_a_pickled_module_says_of_itself_must_agree(monkeypatch):
    found = pickled.read(FIXTURE / "sct_random.pt")
    fast = "enc.performer.net.layers.1.0.fn.fast_attention"
    said = {"enc.max_seq_len": 1999, f"{fast}.causal": True, "translator.dropout0.p": 0.0}
    monkeypatch.setattr(pickled, "read", lambda _: dataclasses.replace(found, scalars={**found.scalars, **said}))
    with pytest.raises(ModelError) as caught:
        room.read(Path("there.pt"))
    assert [fault.where for fault in caught.value.faults] == ["there.pt: enc.max_seq_len", f"there.pt: {fast}.causal"]
    assert "says 1999, but the network has 2000" in str(caught.value)
    still = {"translator.dropout0.p": 0.25, "enc.performer.proj_updater.feature_redraw_interval": None}
    monkeypatch.setattr(pickled, "read", lambda _: dataclasses.replace(found, scalars={**found.scalars, **still}))
    network = room.read(Path("there.pt"))
    assert (network.bridge.dropout.p, network.redraw_interval) == (0.25, 0)


def test_the_exported_file_holds_tensors_alone_and_comes_back(tmp_path):
    network = small()
    room.export_original(network, tmp_path / "there.pt")
    state = torch.load(tmp_path / "there.pt", weights_only=True)
    assert state.keys() == to_original(network).keys()
    back = room.read(tmp_path / "there.pt").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(StorageError):
        room.export_original(network, tmp_path / "there.pt" / "below.pt")


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no")
    (tmp_path / "w.pt").write_bytes(b"no")
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    for name, said in (
        ("w.safetensors", "too few for a safetensors file"),
        ("w.pt", "cannot be read"),
        ("other.safetensors", "no scT"),
    ):
        with pytest.raises(ModelError, match=said):
            room.read(tmp_path / name)


def panel(genes=20, proteins=4, without=()):
    gene_ids = tuple(0 if place in without else place + 1 for place in range(genes))
    names = tuple(f"G{place}" for place in range(genes)), tuple(f"P{place}" for place in range(proteins))
    return Panel(*names, gene_ids, tuple(range(40, 40 + proteins)))


def counts(genes=20):
    from scipy import sparse

    dice = np.random.default_rng(0)
    return sparse.csr_matrix(dice.poisson(1.0, (5, genes)) * (dice.random((5, genes)) < 0.6))


@torch.no_grad()
def test_a_reader_gives_what_forward_takes_scaled_as_published():
    network, table = small().eval(), counts()
    reader = network.reader(panel(without=(0, 7)))
    given = reader.inputs(table)
    assert reader.width == 18
    assert reader.ids == {*range(2, 21), *range(40, 44)} - {8}
    used = [place for place in range(20) if place not in {0, 7}]
    for row, value in zip(given["rna_BG"], table.toarray()[:, used], strict=True):
        low, high = min(value), max(value)
        assert np.allclose(row, 1e-8 + (value - low) / (high - low) * (1 - 1e-8), rtol=1e-6, atol=0)
    assert given["gene_BG"].tolist() == [[place + 1 for place in used]] * 5
    assert network(**given).shape == (5, 4)
    assert torch.equal(network.restricted(reader.ids)(**given), network(**given))
    assert (reader.inputs(table[:2] * 0)["rna_BG"] == 1e-8).all()
    assert torch.equal(reader.inputs(table.toarray())["rna_BG"], given["rna_BG"])


def test_longer_panels_are_refused_or_sampled_by_seed_and_cells():
    network, long, table = small(), panel(genes=39), counts(genes=39)
    with pytest.raises(ModelError, match=r"39 genes with an id, but the network holds 30 - choose 30 of them"):
        network.reader(long)
    first, again, other = (network.reader(long, longer="sample", seed=seed) for seed in (1, 1, 2))
    given = first.inputs(table)
    assert first.width == 30
    assert given["rna_BG"].shape == given["gene_BG"].shape == (5, 30)
    assert (given["gene_BG"].diff(dim=1) > 0).all()
    whole = network.reader(panel(genes=30))
    assert torch.equal(whole.inputs(table[:, :30])["protein_BP"], given["protein_BP"])
    again.inputs(counts(genes=39)[:2])
    assert all(torch.equal(tensor, again.inputs(table)[name]) for name, tensor in given.items())
    assert not torch.equal(other.inputs(table)["gene_BG"], given["gene_BG"])
    assert not torch.equal(first.inputs(table[:2])["gene_BG"], given["gene_BG"][:2])


def test_what_a_panel_lacks_is_named_with_the_remedy():
    network = small()
    nameless = dataclasses.replace(panel(proteins=3), protein_ids=(40, 0, 0))
    with pytest.raises(ModelError, match=r"2 proteins have no id: P1, P2 - give the id table"):
        network.reader(nameless)
    with pytest.raises(ModelError, match="no gene of the panel has an id") as caught:
        network.reader(Panel(("A",), tuple(f"P{place}" for place in range(7))))
    assert "P4 and 2 more" in str(caught.value)
    with pytest.raises(ModelError, match="7 proteins, but the network holds 6"):
        network.reader(panel(proteins=7))
    with pytest.raises(ModelError, match="1 ids are none of the network's: 51"):
        network.reader(dataclasses.replace(panel(), gene_ids=(51, *range(1, 20))))

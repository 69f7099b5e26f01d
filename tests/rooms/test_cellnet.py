"""The network for cells: zeros cost nothing and lose nothing, and a panel is met in closed form, however few its cells.

Shapes: B cells, G genes of a panel, P proteins asked for, M landmarks, F features of the kernel.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from metier.adapt import adapt, merged
from metier.core import ModelError, StorageError
from metier.core.panel import Panel
from metier.models import cellnet as room
from metier.models.cellnet import CellConfig, CellNet, CellReader, calibrate, calibration, origins, protein_keys
from metier.models.cellnet.network import LEAST_SPREAD, PRIOR_CELLS
from metier.models.cellnet.ragged import Ragged
from metier.recipe import FreezeMethod, LoRAMethod

HOME = Panel(tuple(f"G{i}" for i in range(60)), ("CD3", "CD4", "CD8a", "PD-1"))
OTHER = Panel(
    (*(f"g{i}" for i in range(30, 60)), *(f"N{i}" for i in range(40)), "g31"),
    ("CD3_TotalSeqB", "cd4.1", "cd4.2", "CD99", "CD279"),
)
"""Half of the genes of `HOME` in another writing, one of them twice, 40 new ones, and one new protein among five."""
FOREIGN = Panel(tuple(f"Z{i}" for i in range(50)), ("A1", "B2"))


def cells(count, panel=HOME, seed=5):
    """Counts of three kinds of cells, and the kind of each as a row of zeros and a one."""
    from scipy import sparse

    chance = np.random.default_rng(seed)
    level = chance.gamma(0.5, 1.0, (3, len(panel.genes)))
    kind = chance.integers(0, 3, count)
    return sparse.csr_matrix(chance.poisson(level[kind]).astype(np.float32)), np.eye(3, dtype=np.float32)[kind]


def without(table, row):
    """The same cells, one of which has no count."""
    table = table.multiply((np.arange(table.shape[0]) != row)[:, None]).tocsr()
    table.eliminate_zeros()
    return table


def targets(kind, proteins, noise=0.0):
    """Proteins that differ between the kinds."""
    chance = np.random.default_rng(1)
    level = kind @ chance.normal(size=(3, proteins))
    return torch.from_numpy((level + noise * chance.normal(size=level.shape)).astype(np.float32))


def trained(**settings):
    """A network whose weights are no longer those of the first draw, that has seen cells of `HOME`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CellNet(CellConfig(HOME.genes, HOME.proteins, width=32, **settings))
        network.standardise(network.reader(HOME).inputs(cells(300, seed=0)[0]))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.add_(0.05 * torch.randn_like(parameter) * (not name.startswith("head")))
    return network.eval()


def calibrated(count=60):
    """A network on `OTHER`, what its reader made of the cells, and their proteins."""
    network = trained().extended(OTHER)
    table, kind = cells(count, OTHER)
    inputs, target_BP = network.reader(OTHER).inputs(table), targets(kind, 5, noise=0.3)
    calibrate(network, inputs, target_BP)
    return network, inputs, target_BP


def same(left, right):
    """Whether two networks are bit-equal."""
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def of_state(inputs):
    return {name: tensor for name, tensor in inputs.items() if name != "protein_P"}


def plain_values(network, table, rows):
    """The standardised value of every gene of every cell, zeros written out, in float64."""
    count_BG, rate_G = torch.from_numpy(table.toarray()).double(), network.rate_V[rows].double()
    total_B1 = (count_BG * (rate_G > 0)).sum(1, keepdim=True)
    value_BG = torch.log1p(count_BG * rate_G.sum() / total_B1.clamp_min(1.0))
    return (value_BG - network.center_V[rows].double()) / network.spread_V[rows].double(), total_B1


@torch.no_grad()
def plain_state(network, table, rows):
    """The state of every cell, restated without any shortcut in float64."""
    network = copy.deepcopy(network).double()
    value_BG, total_B1 = plain_values(network, table, rows)
    genes_VD = torch.cat([network.genes.weight, network.new_genes.weight])
    x = value_BG @ genes_VD[rows] * 4 / (network.rate_V[rows] > 0).sum().sqrt()
    x = x + network.bias + (total_B1.log1p() - 6) * network.depth_weight
    for block in network.blocks:
        x = x + block.contract(F.gelu(block.expand(block.norm(x))))
    return network.norm(x)


@torch.no_grad()
@pytest.mark.parametrize("panel", [HOME, OTHER, Panel(HOME.genes[7:31], HOME.proteins)])
def test_zeros_that_are_never_touched_count_in_full(panel):
    network = trained().extended(OTHER)
    torch.nn.init.normal_(network.new_genes.weight)
    table, _ = cells(40, panel)
    reader = network.reader(panel)
    exact = plain_state(network, table[:, reader.column_G], torch.from_numpy(reader.row_G))
    found = network.state(**of_state(reader.inputs(table)))
    assert table.nnz < 0.5 * 40 * len(panel.genes)
    assert (found - exact).abs().max() < 2e-5


@torch.no_grad()
def test_cells_do_not_see_each_other():
    network, _, _ = calibrated()
    table, _ = cells(30, OTHER, seed=8)
    reader = network.reader(OTHER)
    alone = torch.cat([network(**reader.inputs(table[row])) for row in range(30)])
    assert torch.allclose(network(**reader.inputs(table)), alone, atol=1e-5)


@torch.no_grad()
def test_extended_to_a_panel_it_answers_as_before_to_the_bit():
    network, before = trained(), torch.get_rng_state()
    inputs = network.reader(HOME).inputs(cells(50)[0])
    further = network.extended(OTHER)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(further(**further.reader(HOME).inputs(cells(50)[0])), network(**inputs))
    assert same(further, network.extended(OTHER))
    assert further.extended(OTHER).config == further.config
    assert not further.training
    assert network.train().extended(OTHER).training


@torch.no_grad()
def test_a_calibrated_network_is_extended_further_and_answers_as_before():
    network, inputs, _ = calibrated()
    further = network.extended(FOREIGN)
    assert further.config.new_genes == (*network.config.new_genes, *FOREIGN.genes)
    table, _ = cells(60, OTHER)
    assert torch.equal(further(**further.reader(OTHER).inputs(table)), network(**inputs))


@torch.no_grad()
def test_names_of_a_panel_meet_those_of_the_pretraining():
    network = trained().extended(OTHER)
    assert network.config.new_genes == tuple(f"N{i}" for i in range(40))
    assert network.config.all_proteins == (*HOME.proteins, *OTHER.proteins)
    assert network.head.origin_O.tolist() == [0, 1, 2, 3, 0, 1, 1, -1, 3]
    answer_BP = network(**network.reader(OTHER).inputs(cells(9, OTHER)[0]))
    assert torch.equal(answer_BP[:, 1], answer_BP[:, 2])
    assert (answer_BP[:, 3] == 0).all()


def test_genes_meet_whatever_their_writing_and_the_first_of_two_columns_is_read():
    from scipy import sparse

    config = CellConfig(("CD3E", "ENSG01.7"), ("CD3",))
    reader = CellReader.of(config, Panel(("ensg01", "none", "cd3e", "CD3E"), ("cd3",)))
    inputs = reader.inputs(sparse.csr_matrix([[5.0, 6.0, 7.0, 8.0], [0.0, 1.0, 0.0, 9.0], [0.0, 0.0, 2.0, 0.0]]))
    assert reader.width == 1
    assert inputs["count_N"].tolist() == [5, 7, 2]
    assert inputs["gene_N"].tolist() == [1, 0, 0]
    assert inputs["offset_B"].tolist() == [0, 2, 2]
    assert inputs["panel_G"].tolist() == [1, 0]
    assert inputs["protein_P"].tolist() == [0]


def test_an_output_is_found_by_its_own_name_before_any_that_means_the_same():
    network = trained().extended(OTHER)
    assert network.reader(OTHER).protein_P.tolist() == [4, 5, 6, 7, 8]
    assert network.reader(Panel(HOME.genes, ("cd8A", "CD4.9", "CD279"))).protein_P.tolist() == [2, 1, 8]


def test_proteins_without_an_output_are_counted_and_named():
    with pytest.raises(ModelError, match="2 proteins have no output, CD99 for one"):
        trained().reader(Panel(HOME.genes, ("CD3", "CD99", "CD98")))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("CD3_TotalSeqB", "cd3.1"),
        ("CD3E", "cd3.2"),
        ("PD-1 (CD279)", "cd279"),
        ("PD1", "PD-1_control_TotalSeqB"),
        ("IL7Ralpha (CD127)", "CD127"),
        ("B7-H1 (PD-L1)", "CD274"),
        ("MHCII (HLA-DR)", "hla.dr"),
        ("anti-CD8a", "cd8"),
        ("Hu.CD56", "NCAM1"),
        ("CD45RA", "cd45ra-2"),
    ],
)
def test_names_of_one_antibody_meet(left, right):
    assert set(protein_keys(left)) & set(protein_keys(right))
    assert origins(["CD99", left], [right]) == [1]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("cd158e1", "cd158"),
        ("siglec.8", "siglec.9"),
        ("tcr.v.9", "tcr.v.2"),
        ("CD45RA", "CD45"),
        ("CD45RA", "CD45RO"),
        ("cd11b.1", "cd11a.cd18"),
        ("notch1", "notch3"),
        ("cd235ab", "cd235a"),
        ("CD1", "CD11"),
        ("PD-1", "PD-L1"),
        ("control", "antibody"),
    ],
)
def test_names_of_two_antibodies_do_not_meet(left, right):
    assert not set(protein_keys(left)) & set(protein_keys(right))
    assert origins([left], [right]) == [-1]


def few_targets(kind, what):
    """Proteins of few cells, spoilt in one way."""
    target_BP, half = targets(kind, 5, noise=0.1), len(kind) // 2
    if what == "not measured here and there":
        target_BP[torch.rand(target_BP.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = torch.nan
        target_BP[:, 3] = torch.nan
    if what == "constant":
        target_BP[:, 0], target_BP[:, 3] = 2.5, -1.0
    if what == "two panels":
        target_BP[half:, :2] = torch.nan
        target_BP[:half, 4] = torch.nan
    return target_BP


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 10, 11, 25, 120])
@pytest.mark.parametrize("what", ["whole", "not measured here and there", "constant", "two panels"])
def test_few_cells_calibrate_to_finite_answers_and_the_same_bits_again(count, what):
    table, kind = cells(count, OTHER)
    target_BP, found = few_targets(kind, what), []
    for _ in range(2):
        network = trained().extended(OTHER)
        inputs = network.reader(OTHER).inputs(table)
        said = calibrate(network, inputs, target_BP, seed=3)
        found.append((network, said))
    answer_BP = network(**inputs)
    assert found[0][1] == said
    assert same(found[0][0], network)
    assert len(said) == (2 if (~target_BP.isnan()).sum(0).max() >= 10 else 1)
    assert answer_BP.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    if what == "constant":
        assert (answer_BP[:, [0, 3]] - torch.tensor([2.5, -1.0])).abs().max() < 1e-3


@torch.no_grad()
def test_without_a_known_gene_or_protein_and_with_empty_cells_it_is_calibrated_all_the_same():
    network = trained().extended(FOREIGN)
    table, kind = cells(100, FOREIGN)
    table = without(table, 3)
    inputs, target_BP = network.reader(FOREIGN).inputs(table), targets(kind, 2)
    said = calibrate(network, inputs, target_BP)
    answer_BP = network(**inputs)
    assert said[0] == "none of the 2 proteins is known from pretraining"
    assert answer_BP.isfinite().all()
    assert (answer_BP - target_BP).square().mean() < 0.1 * target_BP.var()


@torch.no_grad()
def test_cells_without_any_count_answer_alike():
    network, _, _ = calibrated()
    table, _ = cells(4, OTHER)
    answer_BP = network(**network.reader(OTHER).inputs(table * 0))
    assert answer_BP.isfinite().all()
    assert (answer_BP == answer_BP[0]).all()


@torch.no_grad()
def test_what_was_not_measured_is_not_read_as_zero():
    network = trained().extended(OTHER)
    table, kind = cells(200, OTHER)
    inputs, target_BP = network.reader(OTHER).inputs(table), targets(kind, 5) + 5
    half_BP = target_BP.clone()
    half_BP[100:] = torch.nan
    calibrate(network, inputs, half_BP)
    assert (network(**inputs) - target_BP)[100:].square().mean() < 0.1 * target_BP.var(dim=0).mean()


@torch.no_grad()
def test_values_marked_as_not_measured_are_as_good_as_missing():
    table, kind = cells(50, OTHER)
    missing_BP = few_targets(kind, "not measured here and there")
    marked_BP = torch.where(missing_BP.isnan(), 1e6, missing_BP)
    left, right = trained().extended(OTHER), trained().extended(OTHER)
    inputs = left.reader(OTHER).inputs(table)
    calibrate(left, inputs, missing_BP)
    calibrate(right, inputs, marked_BP, ~missing_BP.isnan())
    assert same(left, right)


@torch.no_grad()
def test_outputs_that_were_measured_in_no_cell_keep_the_pretrained_answer():
    network = trained().extended(OTHER)
    table, kind = cells(60, OTHER)
    inputs, target_BP = network.reader(OTHER).inputs(table), targets(kind, 5)
    target_BP[:, 0] = torch.nan
    calibrate(network, inputs, target_BP, adapt=False)
    known_B = network.known(network.state(**of_state(inputs)))[:, 0]
    assert torch.equal(network(**inputs)[:, 0], known_B)


@torch.no_grad()
def test_more_cells_than_landmarks_are_fitted_and_fresh_cells_are_met():
    network = trained().extended(OTHER, landmarks=40)
    table, kind = cells(1500, OTHER)
    reader, target_BP = network.reader(OTHER), targets(kind, 5)
    calibrate(network, reader.inputs(table[:1200]), target_BP[:1200])
    miss_BP = network(**reader.inputs(table[1200:])) - target_BP[1200:]
    assert network.head.landmark_MF.any(1).all()
    assert miss_BP.square().mean() < 0.2 * target_BP.var(dim=0).mean()


@torch.no_grad()
def test_proteins_that_are_noise_are_not_learnt():
    network = trained().extended(FOREIGN)
    table, _ = cells(220, FOREIGN)
    noise_BP = torch.randn(220, 2, generator=torch.Generator().manual_seed(0))
    calibrate(network, network.reader(FOREIGN).inputs(table[:120]), noise_BP[:120])
    answer_BP = network(**network.reader(FOREIGN).inputs(table[120:]))
    assert (answer_BP - noise_BP[:120].mean(0)).square().mean() < 0.1


@torch.no_grad()
def test_reading_the_cells_in_parts_changes_nothing(monkeypatch):
    whole, inputs, _ = calibrated()
    monkeypatch.setattr(calibration, "CHUNK", 7)
    parts, _, _ = calibrated()
    assert torch.allclose(whole(**inputs), parts(**inputs), atol=1e-3)


@torch.no_grad()
def test_calibration_leaves_the_mode_of_the_network_and_the_global_chance_alone():
    network = trained().extended(OTHER).train()
    table, kind = cells(20, OTHER)
    before = torch.get_rng_state()
    calibrate(network, network.reader(OTHER).inputs(table), targets(kind, 5))
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_the_closed_form_is_kernel_ridge_regression_of_what_the_slopes_leave():
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import KernelCenterer

    panel = Panel(HOME.genes, (*HOME.proteins, "CD99"))
    network = trained().extended(panel, components=5, landmarks=80)
    table, kind = cells(100)
    reader, target_BP = network.reader(panel), targets(kind, 5, noise=0.5)
    calibrate(network, reader.inputs(table[:80]), target_BP[:80])
    inputs = reader.inputs(table)
    state_BD = network.state(**of_state(inputs))
    feature_BF = network.features(state_BD, *(inputs[name] for name in ("count_N", "gene_N", "offset_B"))).double()
    line_BP = (network.head.slope_O * network.head.prior(network.known(state_BD)))[:, inputs["protein_P"]].double()
    rest_BP = (target_BP - line_BP)[:80].numpy()
    kernel_BM = rbf_kernel(feature_BF, feature_BF[:80], gamma=1.0)
    center = KernelCenterer().fit(kernel_BM[:80])
    found_BP, wanted = network(**inputs).numpy(), []
    for strength in calibration.STRENGTHS:
        ridge = KernelRidge(alpha=strength, kernel="precomputed")
        ridge.fit(center.transform(kernel_BM[:80]), rest_BP - rest_BP.mean(0))
        wanted.append(line_BP.numpy() + rest_BP.mean(0) + ridge.predict(center.transform(kernel_BM)))
    miss_LP = np.abs(np.stack(wanted) - found_BP).max(1)
    assert network.head.weight_MO.any(0)[inputs["protein_P"]].all()
    assert (miss_LP.min(0) < 1e-3).all()
    assert (np.sort(miss_LP, axis=0)[1] > 1e-2).all()


def lines(count, noise=0.0):
    """A network without landmarks, cells, and targets that follow its answers with slopes of their own."""
    network = trained().extended(HOME, components=0, landmarks=0)
    inputs = network.reader(HOME).inputs(cells(count)[0])
    with torch.no_grad():
        answer_BP = network(**inputs)
    noise_BP = torch.randn(answer_BP.shape, generator=torch.Generator().manual_seed(0)) * answer_BP.std()
    return network, inputs, answer_BP, answer_BP * torch.tensor([0.5, 1.0, 2.0, 3.0]) + 7 + noise * noise_BP


@torch.no_grad()
def test_slopes_and_shifts_of_many_cells_are_their_own():
    network, inputs, _, target_BP = lines(800)
    said = calibrate(network, inputs, target_BP, adapt=False)
    assert torch.allclose(network.head.slope_O, torch.tensor([0.5, 1.0, 2.0, 3.0]), atol=0.02)
    assert torch.allclose(network(**inputs), target_BP, atol=0.02)
    assert len(said) == 1
    assert said[0].startswith("4 of 4 proteins are known from pretraining: slopes 0.50 to 3.00")


@torch.no_grad()
def test_slopes_of_few_cells_shrink_to_the_common_one():
    spread = []
    for count in (8, 800):
        network, inputs, _, target_BP = lines(count, noise=2.0)
        calibrate(network, inputs, target_BP, adapt=False)
        spread.append(float(network.head.slope_O.max() - network.head.slope_O.min()))
    assert spread[0] < 0.3 * spread[1]


@torch.no_grad()
def test_a_slope_lies_between_least_squares_and_what_all_proteins_share():
    network, inputs, answer_BP, target_BP = lines(40, noise=0.5)
    known = calibration._gather(network, inputs, target_BP, None, 0)
    every_B = torch.ones(40, dtype=torch.bool)
    own_P, shift_P = calibration._line(known, every_B, 0.0)
    pairs = zip(answer_BP.T.double().numpy(), target_BP.T.double().numpy(), strict=True)
    assert np.allclose(np.polyfit(*next(pairs), 1), [own_P[0], shift_P[0]], rtol=1e-6)
    centred_BP = (answer_BP - answer_BP.mean(0)).double()
    common = float((centred_BP * target_BP).sum() / centred_BP.square().sum())
    half_P, _ = calibration._line(known, every_B, 40.0)
    all_P, _ = calibration._line(known, every_B, 1e12)
    assert all_P.tolist() == pytest.approx([common] * 4)
    assert half_P.tolist() == pytest.approx(((own_P + common) / 2).tolist())


@torch.no_grad()
def test_far_from_the_cells_of_calibration_the_kernel_fades():
    network, inputs, _ = calibrated()
    head, known_BK = network.head, network.known(network.state(**of_state(inputs)))
    far_BF = head.landmark_MF[:1].expand(60, -1) + 100
    assert torch.equal(head(known_BK, far_BF), head.slope_O * head.prior(known_BK) + head.shift_O)


def test_components_are_the_principal_axes_of_the_centred_table():
    table, _ = cells(80)
    values = np.log1p(table)
    offset_B = torch.from_numpy(values.indptr[:-1].astype(np.int64))
    ragged = Ragged.of(torch.from_numpy(values.data), torch.from_numpy(values.indices).long(), offset_B, 60)
    left_BC, axes_VC = ragged.principal(2, seed=0)
    dense = values.toarray() - values.toarray().mean(0)
    left, _, right = np.linalg.svd(dense, full_matrices=False)
    assert np.allclose(ragged.mean_V, values.toarray().mean(0), atol=1e-6)
    for place in range(2):
        assert abs(left[:, place] @ left_BC[:, place].numpy()) == pytest.approx(1, abs=1e-4)
        assert abs(right[place] @ axes_VC[:, place].numpy()) == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path):
    network, inputs, _ = calibrated()
    room.save(network.train(), tmp_path / "there")
    found = room.load(tmp_path / "there")
    assert found.config == network.config
    assert not found.training
    assert same(found, network)
    assert torch.equal(found(**inputs), network.eval()(**inputs))


def damage_config(folder):
    (folder / "config.json").write_text("{}")


def damage_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": 31}))


def damage_word(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "blocks": "two"}))


def damage_end(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["knwon.bias"] = tensors.pop("known.bias")
    save_file(tensors, folder / "model.safetensors")


def damage_missing(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_config, "the network cannot be read: 'genes'"),
        (damage_sizes, "bias: is missing, left over or misshapen"),
        (damage_word, "the network cannot be read"),
        (damage_end, "lies outside the file"),
        (damage_tensor, r"(?s)known\.bias.*knwon\.bias"),
        (damage_missing, "there is no such file"),
    ],
)
def test_a_damaged_folder_is_refused(damage, said, tmp_path):
    room.save(trained(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=said):
        room.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        room.save(trained(), tmp_path / "file" / "below")


@pytest.fixture
def lora():
    """A calibrated network before and after peft has wrapped it, and its cells."""
    network, inputs, target_BP = calibrated()
    before = copy.deepcopy(network)
    adapted = adapt(network, LoRAMethod(rank=4, alpha=8), new=network.whole())
    return before, adapted.module, inputs, target_BP


def tune(module, inputs, target_BP, steps=3):
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, 1e-2)
    module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            (module(**inputs) - target_BP).square().mean().backward()
            optimizer.step()
    return module.eval()


@torch.no_grad()
def test_under_lora_it_answers_at_first_as_it_was_calibrated(lora):
    before, module, inputs, _ = lora
    assert torch.equal(module.eval()(**inputs), before(**inputs))


def test_under_lora_head_and_new_genes_move_whole(lora):
    before, module, inputs, target_BP = lora
    tune(module, inputs, target_BP)
    moving = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(any(part in name for part in ("lora_", "head.", "new_genes.")) for name in moving)
    # What moved, in the network's own names.
    after = dict(merged(module).named_parameters())
    for name in before.whole():
        assert not torch.equal(after[name], before.get_parameter(name)), name
    assert not torch.equal(after["known.weight"], before.known.weight)
    assert torch.equal(after["genes.weight"], before.genes.weight)
    assert torch.equal(after["bias"], before.bias)


def test_tuned_with_lora_and_merged_it_answers_the_same(lora, tmp_path):
    before, module, inputs, target_BP = lora
    tune(module, inputs, target_BP)
    with torch.no_grad():
        tuned_BP = module(**inputs)
        network = merged(module)
        assert isinstance(network, CellNet)
        assert torch.allclose(network(**inputs), tuned_BP, atol=1e-4)
        assert not torch.allclose(before(**inputs), tuned_BP, atol=1e-2)
        room.save(network, tmp_path)
        assert torch.equal(room.load(tmp_path)(**inputs), network(**inputs))


def test_the_last_block_can_move_alone_beside_head_and_new_genes():
    network, inputs, target_BP = calibrated(20)
    before = copy.deepcopy(network)
    module = tune(adapt(network, FreezeMethod(blocks=1), new=network.whole()).module, inputs, target_BP)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert set(before.whole()) <= moved
    assert {name.split(".")[0] for name in moved} == {"blocks", "head", "new_genes"}
    assert not any(name.startswith("blocks.0") for name in moved)


def test_whole_are_the_parameters_that_calibration_fits_and_new_genes():
    network = trained()
    assert network.whole() == ("head.slope_O", "head.shift_O")
    kernel = ("head.slope_O", "head.shift_O", "head.landmark_MF", "head.weight_MO")
    assert network.extended(HOME).whole() == kernel
    assert network.extended(OTHER).whole() == ("new_genes.weight", *kernel)


def test_it_knows_the_proteins_of_its_pretraining_under_any_name():
    network = trained()
    assert network.knows(OTHER) == ("CD3_TotalSeqB", "cd4.1", "cd4.2", "CD279")
    assert network.extended(OTHER).knows(OTHER) == network.knows(OTHER)
    assert network.knows(FOREIGN) == ()


def test_a_network_that_begins_from_nothing_is_drawn_from_its_seed_alone():
    before = torch.get_rng_state()
    network = room.new(HOME, 3)
    assert same(network, room.new(HOME, 3))
    assert not same(network, room.new(HOME, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.is_trained


def test_fit_standardises_the_genes_of_a_network_that_begins_from_nothing():
    network = room.new(HOME, 0)
    table, kind = cells(200)
    table = table.multiply(np.arange(60) != 9).tocsr()
    table.eliminate_zeros()
    said = network.fit(network.reader(HOME).inputs(table), targets(kind, 4), seed=0, head=True)
    assert said == ["gene by gene, centre and spread are those of the training cells"]
    assert network.is_trained
    assert float(network.rate_V.sum()) == pytest.approx(1000)
    value_BG, _ = plain_values(network, table, torch.arange(60))
    assert value_BG.mean(0).abs().max() < 1e-3
    seen_V = network.spread_V > LEAST_SPREAD
    assert torch.allclose(value_BG.std(0, unbiased=False)[seen_V], torch.ones((), dtype=torch.float64), atol=1e-3)
    assert float(network.spread_V[9]) == pytest.approx(LEAST_SPREAD)
    assert seen_V.sum() > 40


def test_fit_sets_the_bias_of_a_network_that_begins_from_nothing_to_the_mean_of_what_was_measured():
    network = room.new(HOME, 0)
    before = copy.deepcopy(network.head)
    table, _ = cells(3)
    backwards = network.reader(Panel(HOME.genes, HOME.proteins[::-1]))
    nan = float("nan")
    target_BP = torch.tensor([[1.0, 4.0, nan, nan], [3.0, nan, nan, 5.0], [5.0, 8.0, nan, nan]])
    network.fit(backwards.inputs(table), target_BP, seed=0, head=True)
    assert network.known.bias.tolist() == [5, 0, 6, 3]
    assert same(network.head, before)


@torch.no_grad()
def test_fit_of_a_trained_network_calibrates_its_head():
    left, right = trained().extended(OTHER), trained().extended(OTHER)
    table, kind = cells(30, OTHER)
    inputs, target_BP = left.reader(OTHER).inputs(table), targets(kind, 5)
    assert left.fit(inputs, target_BP, seed=7, head=True) == calibrate(right, inputs, target_BP, seed=7)
    assert same(left, right)


def test_fit_of_a_trained_network_without_its_head_moves_centre_and_spread_alone():
    network = trained().extended(OTHER)
    before = copy.deepcopy(network)
    table, kind = cells(30, OTHER)
    assert network.fit(network.reader(OTHER).inputs(table), targets(kind, 5), seed=0, head=False) == []
    after = network.state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert changed == {"center_V", "spread_V"}


def test_new_cells_move_centre_and_spread_by_their_number_and_what_they_lack_keeps_its_own():
    network = trained().extended(OTHER)
    before = copy.deepcopy(network)
    table, _ = cells(int(PRIOR_CELLS), OTHER)
    reader = network.reader(OTHER)
    network.standardise(reader.inputs(table), prior_cells=PRIOR_CELLS)
    rows = torch.from_numpy(reader.row_G)
    value_BG, _ = plain_values(before, table[:, reader.column_G], rows)
    center_G, spread_G = before.center_V[rows].double(), before.spread_V[rows].double()
    value_BG = value_BG * spread_G + center_G
    share_G = torch.where(rows < 60, 0.5, 0.0)
    wanted_G = share_G * center_G + (1 - share_G) * value_BG.mean(0)
    square_G = share_G * (spread_G**2 + center_G**2) + (1 - share_G) * value_BG.square().mean(0)
    assert torch.allclose(network.center_V[rows].double(), wanted_G, atol=1e-4)
    spread_G = (square_G - wanted_G**2).sqrt().clamp_min(LEAST_SPREAD)
    assert torch.allclose(network.spread_V[rows].double(), spread_G, atol=1e-3)
    assert torch.equal(network.center_V[:30], before.center_V[:30])
    assert torch.equal(network.spread_V[:30], before.spread_V[:30])
    assert torch.equal(network.rate_V, before.rate_V)


@torch.no_grad()
def test_part_of_the_panel_is_hidden_in_training_only():
    inputs = trained().reader(HOME).inputs(cells(5)[0])
    always, never = trained(dropout=0.0, panel_odds=1.0), trained(dropout=0.0, panel_odds=0.0)
    whole = always(**inputs)
    assert torch.equal(always(**inputs), whole)
    assert torch.equal(never.train()(**inputs), whole)
    torch.manual_seed(0)
    assert not torch.allclose(always.train()(**inputs), whole)
    assert torch.equal(always.eval()(**inputs), whole)


@torch.no_grad()
def test_a_hidden_part_of_the_panel_is_as_if_it_had_never_been_measured():
    network, (table, _), seen = trained(dropout=0.0, panel_odds=1.0), cells(20), []
    network.norm.register_forward_hook(lambda _, __, state_BD: seen.append(state_BD))
    network._narrowed = lambda *given: seen.append(CellNet._narrowed(network, *given)) or seen[-1]
    inputs = network.reader(HOME).inputs(table)
    torch.manual_seed(1)
    network.train()(**inputs)
    (_, panel_G), found = seen
    assert 0 < len(panel_G) < 60
    few = Panel(tuple(HOME.genes[row] for row in panel_G), HOME.proteins)
    wanted = network.eval().state(**of_state(network.reader(few).inputs(table[:, panel_G.numpy()])))
    assert torch.allclose(found, wanted, atol=1e-5)


@torch.no_grad()
def test_components_stay_whole_where_part_of_the_panel_is_hidden():
    network, inputs, _ = calibrated()
    seen = []
    network.head.register_forward_pre_hook(lambda _, given: seen.append(given[1][:, network.config.width :]))
    network(**inputs)
    network.config = dataclasses.replace(network.config, panel_odds=1.0)
    torch.manual_seed(0)
    network.train()
    for _ in range(5):
        network(**inputs)
    assert all(torch.equal(component_BC, seen[0]) for component_BC in seen)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_any_part_of_the_genes_gives_finite_answers_and_gradients(share):
    network, _, _ = calibrated()
    chance = np.random.default_rng(0)
    genes = [name for name in OTHER.genes if chance.random() < share] or ["not one that it knows"]
    panel = Panel(tuple(genes), OTHER.proteins)
    table, _ = cells(6, panel)
    inputs = network.reader(panel).inputs(table)
    assert network(**inputs).isfinite().all()
    torch.manual_seed(0)
    with torch.enable_grad():
        network.train()(**inputs).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_network_that_begins_from_nothing_learns_the_proteins_of_cells_it_never_saw():
    network = room.new(HOME, 0)
    table, kind = cells(500)
    reader, target_BP = network.reader(HOME), targets(kind, 4)
    inputs = reader.inputs(table[:400])
    network.fit(inputs, target_BP[:400], seed=0, head=True)
    tune(network, inputs, target_BP[:400], steps=60)
    with torch.no_grad():
        miss_BP = network(**reader.inputs(table[400:])) - target_BP[400:]
    assert miss_BP.square().mean() < 0.3 * target_BP.var(dim=0).mean()


@torch.no_grad()
@pytest.mark.parametrize("count", [5, 60])
def test_calibrated_on_a_second_panel_the_outputs_of_the_first_stay_near_their_cells(count):
    network, inputs, target_BP = calibrated(100)
    further = network.extended(FOREIGN)
    table, kind = cells(count, FOREIGN)
    calibrate(further, further.reader(FOREIGN).inputs(table), targets(kind, 2))
    miss_BP = further(**inputs) - target_BP
    assert (miss_BP.mean(0).abs() < 0.5 * target_BP.std(0)).all()
    assert (miss_BP.square().mean(0) < 1.3 * target_BP.var(0)).all()


def test_fit_of_an_extended_network_that_saw_no_cell_sets_the_bias_of_its_own_proteins():
    network = room.new(HOME, 0).extended(FOREIGN)
    table, _ = cells(3)
    panel = Panel(HOME.genes, ("A1", "CD4"))
    network.fit(network.reader(panel).inputs(table), torch.tensor([[7.0, 1.0]] * 3), seed=0, head=True)
    assert network.known.bias[1] == 1
    assert 7 not in network.known.bias.tolist()

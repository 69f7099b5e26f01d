"""Cells are joined by name, checked whole, read by rows, split by donor, and predictions read back."""

import pickle
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_cells import muon, symbols, synthetic, write_h5mu, write_pair

from metier.core import DataError
from metier.core.panel import Panel
from metier.data.cells import (
    CellTable,
    Transform,
    log_normalise,
    overlap,
    rank_rows,
    read_cells,
    read_id_table,
    split_cells,
    write_predictions,
)

anndata = pytest.importorskip("anndata")
h5py = pytest.importorskip("h5py")
mudata = pytest.importorskip("mudata")
pd = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")

REAL = Path(__file__).parents[3] / "shared" / "data" / "cells"


def everyone(table):
    return np.arange(len(table))


def same(one, other):
    assert one.names.tolist() == other.names.tolist()
    assert one.panel == other.panel
    assert (one.rna(everyone(one)) != other.rna(everyone(other))).nnz == 0
    assert np.array_equal(one.proteins(everyone(one)), other.proteins(everyone(other)), equal_nan=True)


def refused(*words, **given):
    """Reading refuses, and the message says all the words."""
    with pytest.raises(DataError) as caught:
        read_cells(**given)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return caught.value


def renamed(data, **axes):
    data = data.copy()
    for axis, names in axes.items():
        setattr(data, axis, names)
    return data


class TestReading:
    def test_a_pair_a_joint_file_and_objects_are_one(self, tmp_path):
        rna, proteins = synthetic()
        pair = read_cells(*write_pair(tmp_path, rna, proteins))
        joint = read_cells(write_h5mu(tmp_path / "both.h5mu", rna=rna, prot=proteins))
        objects = [CellTable.of(rna, proteins), CellTable.of(muon(rna=rna, prot=proteins))]
        for other in (joint, *objects):
            same(pair, other)
            assert other.fingerprint() == pair.fingerprint()
        assert pair.panel.genes == tuple(symbols(40))
        assert pair.rna(everyone(pair)).dtype == np.float32
        assert np.array_equal(pair.rna(everyone(pair)).toarray(), rna.X.toarray())
        assert np.array_equal(pair.proteins(everyone(pair)), proteins.X)

    @pytest.mark.parametrize("layout", ["sparse", "dense", "columns"])
    def test_what_stays_on_disk_is_read_as_what_does_not(self, tmp_path, layout):
        rna, proteins = synthetic()
        kept = CellTable.of(rna, proteins)
        rna.X = {"sparse": rna.X, "dense": rna.X.toarray(), "columns": rna.X.tocsc()}[layout]
        files = write_pair(tmp_path, rna, proteins)
        table = read_cells(*files, memory_bytes=10**6 if layout == "columns" else 0)
        assert table.on_disk == (layout != "columns")
        same(table, kept)
        assert table.fingerprint() == kept.fingerprint()
        for rows in ([7, 3, 3, 119, 8, 9], [5], [], list(range(119, -1, -1))):
            at = np.array(rows, dtype=np.int64)
            assert np.array_equal(table.rna(at).toarray(), kept.rna(at).toarray())
            assert np.array_equal(table.proteins(at), kept.proteins(at))

    def test_a_table_on_disk_goes_to_another_process(self, tmp_path):
        table = read_cells(*write_pair(tmp_path, *synthetic()), memory_bytes=0)
        again = pickle.loads(pickle.dumps(table.rna_source))
        assert (again.read(np.arange(5)) != table.rna(np.arange(5))).nnz == 0

    def test_columns_too_large_to_turn_round(self, tmp_path):
        rna, proteins = synthetic()
        rna.X = rna.X.tocsc()
        refused(
            "stored by columns (CSC",
            "tocsr()",
            file=write_pair(tmp_path, rna, proteins)[0],
            with_proteins=False,
            memory_bytes=0,
        )

    def test_only_rna_is_enough_to_predict(self, tmp_path):
        rna, _ = synthetic()
        rna.write_h5ad(tmp_path / "rna.h5ad")
        table = read_cells(tmp_path / "rna.h5ad", with_proteins=False)
        assert not table.measured
        assert table.panel.proteins == ()
        assert table.proteins(np.arange(3)).shape == (3, 0)
        refused("holds RNA only", "data.proteins=FILE", file=tmp_path / "rna.h5ad")

    def test_the_caller_s_object_is_left_as_it_is(self):
        rna, proteins = synthetic()
        before = rna.X.copy()
        table = CellTable.of(rna, proteins)
        table.rna(everyone(table)).data[:] = 0
        table.proteins(everyone(table))[:] = 0
        assert (before != rna.X).nnz == 0

    def test_annotations_are_recognised(self):
        table = CellTable.of(*synthetic())
        assert set(table.obs) == {"donor", "cell_type"}
        assert sorted(set(table.obs["donor"])) == ["P0", "P1"]
        assert "donor is obs['Donor_ID']: 2 values." in table.notes

    def test_annotations_are_named(self):
        rna, proteins = synthetic()
        rna.obs["who"] = rna.obs["celltype.l1"]
        rna.obs["site"] = 3
        table = CellTable.of(rna, proteins, columns={"donor": "who"}, group="site")
        assert sorted(set(table.obs["donor"])) == ["B", "Mono", "T"]
        assert set(table.obs["site"]) == {"3"}
        refused(
            "no column 'hwo'",
            "data.columns.donor",
            "did you mean who?",
            file=rna,
            proteins=proteins,
            columns={"donor": "hwo"},
        )
        refused("no column 'sit'", "data.group", "did you mean site?", file=rna, proteins=proteins, group="sit")

    def test_annotations_above_the_modalities(self, tmp_path):
        rna, proteins = synthetic()
        rna.obs.drop(columns=list(rna.obs), inplace=True)
        data = muon(rna=rna, prot=proteins)
        data.obs["patient"] = [f"x{i % 4}" for i in range(120)]
        table = CellTable.of(data)
        assert table.obs["donor"].tolist() == [f"x{i % 4}" for i in range(120)]

    def test_modalities(self, tmp_path):
        rna, proteins = synthetic()
        same(CellTable.of(muon(GEX=rna, ADT=proteins)), CellTable.of(rna, proteins))
        odd = muon(one=rna, two=proteins)
        same(CellTable.of(odd, columns={"rna": "one", "protein": "two"}), CellTable.of(rna, proteins))
        refused("one, two: none of these is known as RNA", "data.columns={rna: NAME}", file=odd)
        refused("no modality 'three'", "it has one, two", file=odd, columns={"rna": "three"})
        refused("several of these could be proteins", file=muon(rna=rna, adt=proteins, prot=proteins))
        refused("holds proteins already", file=muon(rna=rna, prot=proteins), proteins=proteins)

    def test_a_word_for_a_modality_where_there_is_none(self):
        rna, proteins = synthetic()
        refused("no modality 'rna'", "leave the word out", file=rna, proteins=proteins, columns={"rna": "rna"})
        refused("holds RNA only", file=rna, columns={"protein": "prot"})

    def test_an_object_backed_by_a_file(self, tmp_path):
        file, other = write_pair(tmp_path, *synthetic())
        backed = anndata.read_h5ad(file, backed="r")
        proteins = anndata.read_h5ad(other)
        table = CellTable.of(backed, proteins, memory_bytes=0)
        assert table.on_disk
        same(table, read_cells(file, other))
        refused("is a view of a file", ".to_memory()", file=backed[:50], proteins=proteins)
        path = write_predictions(backed, [(np.arange(2), np.ones((2, 1)))], ["p"], tmp_path / "out.h5ad", {})
        assert anndata.read_h5ad(path).uns["metier"]["X"].startswith("left out")
        backed.file.close()

    def test_a_file_read_whole_can_be_written_over(self, tmp_path):
        rna, proteins = synthetic()
        file, other = write_pair(tmp_path, rna, proteins)
        table = read_cells(file, other)
        rna.write_h5ad(file)
        same(table, read_cells(file, other))

    def test_layers_and_raw(self, tmp_path):
        rna, proteins = synthetic()
        kept = CellTable.of(rna, proteins)
        rna.layers["counts"] = rna.X.copy()
        rna.raw = rna.copy()
        rna = rna[:, :30].copy()
        rna.X = log_normalise(rna.X)
        files = write_pair(tmp_path, rna, proteins)
        for given in ({"file": rna, "proteins": proteins}, {"file": files[0], "proteins": files[1]}):
            same(read_cells(**given, columns={"layer": "raw.X"}), kept)
            assert len(read_cells(**given, columns={"layer": "counts"}).panel.genes) == 30
            refused("log-normalised values", "about 10,000", "data.columns={layer: counts}", **given)
            refused("no layer 'count'", "did you mean counts?", **given, columns={"layer": "count"})

    def test_an_unknown_word_in_columns(self):
        rna, proteins = synthetic()
        refused("data.columns.doner", "did you mean donor?", file=rna, proteins=proteins, columns={"doner": "x"})

    def test_what_was_not_measured(self, tmp_path):
        rna, proteins = synthetic()
        gaps = np.zeros(proteins.shape, bool)
        gaps[:60, 1] = True
        holes = proteins.copy()
        holes.X = np.where(gaps, np.nan, proteins.X)
        proteins.layers["mask"] = ~gaps
        masked = read_cells(*write_pair(tmp_path, rna, proteins), memory_bytes=0)
        same(masked, CellTable.of(rna, holes))
        assert np.array_equal(np.isnan(masked.proteins(everyone(masked))), gaps)

    def test_the_missing_package(self, tmp_path, monkeypatch):
        file, _ = write_pair(tmp_path, *synthetic())
        for name in ("anndata", "anndata.io"):
            monkeypatch.setitem(sys.modules, name, None)
        refused("the package anndata", "pip install 'metier[bio]'", file=file, with_proteins=False)


class TestFiles:
    def test_that_are_none(self, tmp_path):
        refused("no such file", file=tmp_path / "none.h5ad")
        refused("is a folder", "zarr stores are not read", file=tmp_path)
        (tmp_path / "empty.h5ad").touch()
        refused("is empty (0 bytes)", file=tmp_path / "empty.h5ad")
        (tmp_path / "text.h5ad").write_text("gene,count\n")
        refused("is no HDF5 file", "gene,cou", file=str(tmp_path / "text.h5ad"))
        (tmp_path / "packed.h5ad").write_bytes(b"\x1f\x8b\x08\x00123456")
        refused("gzip: unpack it first", file=tmp_path / "packed.h5ad")
        refused("is no regular file", file=Path("/dev/null"))
        refused("is a int", "AnnData or a MuData", file=3)

    def test_two_that_are_none_are_told_at_once(self, tmp_path):
        assert len(refused("a.h5ad", "b.h5ad", file=tmp_path / "a.h5ad", proteins=tmp_path / "b.h5ad").faults) == 2

    def test_cut_short(self, tmp_path):
        file, _ = write_pair(tmp_path, *synthetic())
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        refused("is cut short", "copy or write the file again", file=file)

    def test_of_another_kind(self, tmp_path):
        with h5py.File(tmp_path / "ten.h5", "w") as file:
            file.create_group("matrix")
        refused("neither h5mu nor h5ad: it holds matrix", file=tmp_path / "ten.h5")

    @pytest.mark.parametrize("harm", ["indptr", "indices", "X", "obs", "strings"])
    def test_damaged(self, tmp_path, harm):
        path, _ = write_pair(tmp_path, *synthetic())
        with h5py.File(path, "r+") as file:
            if harm == "indptr":
                file["X/indptr"][3] = 10**6
            elif harm == "indices":
                file["X/indices"][0] = 99
            elif harm == "strings":
                del file["X"]
                file["X"] = np.array([[b"a", b"b"]] * 120)
            else:
                del file[harm]
        said = {
            "indptr": "its parts do not fit together",
            "indices": "names columns that do not exist",
            "X": "has no matrix X",
            "obs": "neither h5mu nor h5ad",
            "strings": "no numbers",
        }
        refused(said[harm], file=path, with_proteins=False)

    def test_a_matrix_of_another_shape(self, tmp_path):
        path, _ = write_pair(tmp_path, *synthetic())
        with h5py.File(path, "r+") as file:
            file["X"].attrs["shape"] = np.array([120, 50])
        refused("X is 120 x 50, but there are names for 120 x 40", file=path, with_proteins=False)

    def test_one_that_disappears_later(self, tmp_path):
        path, _ = write_pair(tmp_path, *synthetic())
        table = read_cells(path, with_proteins=False, memory_bytes=0)
        moved = pickle.loads(pickle.dumps(table.rna_source))
        path.unlink()
        with pytest.raises(DataError, match="no such file"):
            moved.read(np.arange(3))

    def test_one_that_is_written_anew_while_it_is_read(self, tmp_path):
        path, _ = write_pair(tmp_path, *synthetic())
        moved = pickle.loads(pickle.dumps(read_cells(path, with_proteins=False, memory_bytes=0).rna_source))
        write_pair(tmp_path, *synthetic())
        with pytest.raises(DataError, match="has changed since it was looked through"):
            moved.read(np.arange(3))


def _points_to_another_file(file, folder):
    file["uns/other"] = h5py.ExternalLink(folder / "other.h5", "/")


def _has_its_values_in_another_file(file, folder):
    file.create_dataset("uns/values", (4,), "u1", external=[(str(folder / "secret"), 0, 4)])


def _is_put_together_out_of_other_files(file, folder):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "x", (4,))
    file.create_virtual_dataset("layers/counts", layout)


def _promises_what_it_does_not_hold(file, _):
    file.create_dataset("obs/promised", (1 << 40,), "f8", chunks=(1 << 16,), compression="gzip")


def _is_a_bomb_of_texts(file, _):
    del file["obs/_index"]
    texts = np.array(["x" * (1 << 20)] + ["y"] * (1 << 20), dtype=object)
    file.create_dataset("obs/_index", data=texts, dtype=h5py.string_dtype(), compression="gzip", chunks=(1 << 14,))


def _goes_round(file, _):
    file["obs/round"] = file["obs"]


def _unpacks_to_much(file, _):
    shape = (1, 3 << 27)
    file.create_dataset("layers/wide", shape, "u1", chunks=shape, compression="gzip", compression_opts=1)[0, 0] = 1


class TestLookedThrough:
    """What must never reach the process that trains: it would hang, grow, or read another file."""

    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (_points_to_another_file, "points to another file"),
            (_has_its_values_in_another_file, "has its values in other files"),
            (_is_put_together_out_of_other_files, "has its values in other files"),
            (_promises_what_it_does_not_hold, "would take 8,796,093,022,208 bytes"),
            (_is_a_bomb_of_texts, "would take"),
            (_goes_round, "cannot be looked through within"),
            (_unpacks_to_much, "MiB"),
        ],
    )
    def test_refused(self, tmp_path, harm, said):
        path, _ = write_pair(tmp_path, *synthetic())
        (tmp_path / "secret").write_bytes(b"word")
        with h5py.File(path, "r+") as file:
            harm(file, tmp_path)
        refused(said, "write the file again", file=path, with_proteins=False)

    def test_the_look_is_taken_once_for_a_file(self, tmp_path, monkeypatch):
        from metier.data.cells import looking

        begun = []
        begin = looking.begin
        monkeypatch.setattr(looking, "begin", lambda *given: begun.append(given) or begin(*given))
        path, _ = write_pair(tmp_path, *synthetic())
        source = read_cells(path, with_proteins=False, memory_bytes=0).rna_source
        pickle.loads(pickle.dumps(source)).read(np.arange(3))
        assert len(begun) == 1

    def test_what_nobody_reads_may_be_strange(self, tmp_path):
        path, _ = write_pair(tmp_path, *synthetic())
        with h5py.File(path, "r+") as file:
            file["uns/gone"] = h5py.SoftLink("/nowhere")
            file["uns/type"] = np.dtype("i4")
        assert len(read_cells(path, with_proteins=False)) == 120


class TestJoin:
    def test_another_order(self):
        rna, proteins = synthetic()
        table = CellTable.of(rna, proteins[::-1].copy())
        same(table, CellTable.of(rna, proteins))
        assert any("joined by name" in note for note in table.notes)

    def test_cells_of_one_side_only(self, tmp_path):
        rna, proteins = synthetic()
        files = write_pair(tmp_path, rna[10:].copy(), proteins[:90][::-1].copy())
        table = read_cells(*files, memory_bytes=0)
        assert table.names.tolist() == rna.obs_names[10:90].tolist()
        assert "80 cells have both RNA and proteins; left out: 30 of RNA and 10 of proteins." in table.notes
        assert np.array_equal(table.rna(everyone(table)).toarray(), rna.X[10:90].toarray())
        assert np.array_equal(table.proteins(everyone(table)), proteins.X[10:90])
        assert table.source_rows(np.array([0, 5])).tolist() == [0, 5]
        assert table.obs["donor"].tolist() == rna.obs["Donor_ID"][10:90].tolist()

    def test_fewer_than_half(self):
        rna, proteins = synthetic()
        refused("only 39 cells have both: of 79 of RNA and 80 of proteins", file=rna[:79], proteins=proteins[40:])

    def test_no_name_in_common(self):
        rna, proteins = synthetic()
        other = renamed(proteins, obs_names=[f"x{i}" for i in range(120)])
        refused("none of its 120 cells", "never matched by position", file=rna, proteins=other)
        fewer = refused("none of its 60 cells", file=rna, proteins=other[:60])
        assert "position" not in str(fewer)
        bare = renamed(proteins, obs_names=[f"cell{i}" for i in range(120)])
        refused("agree but for their ending", file=rna, proteins=bare)

    def test_numbers_for_names(self):
        rna, proteins = (renamed(side, obs_names=[str(i) for i in range(120)]) for side in synthetic())
        refused("only their numbers", "never matched by position", file=rna, proteins=proteins)

    def test_repeated_names_on_both_sides_at_once(self):
        rna, proteins = synthetic()
        names = ["twice", "twice", *rna.obs_names[2:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rna, proteins = (renamed(side, obs_names=names) for side in (rna, proteins))
        error = refused(
            "1 cell name stands more than once: twice", "donor + '_' + barcode", file=rna, proteins=proteins
        )
        assert len(error.faults) == 2

    def test_no_cells(self):
        rna, proteins = synthetic()
        refused("has no cells", file=rna[:0].copy(), proteins=proteins)


ENSEMBL = [f"ENSG{i:011d}" for i in range(40)]


class TestNames:
    def test_ensembl_with_symbols(self):
        rna, proteins = synthetic()
        rna.var["feature_name"] = rna.var_names.to_list()
        rna = renamed(rna, var_names=ENSEMBL)
        table = CellTable.of(rna, proteins)
        assert table.panel.genes == tuple(symbols(40))
        assert any("symbols from var['feature_name']" in note for note in table.notes)
        rna.var["feature_name"] = ["CD3E", "CD3E", "", *symbols(40)[3:]]
        table = CellTable.of(rna, proteins)
        assert table.panel.genes[:4] == ("CD3E", ENSEMBL[1], ENSEMBL[2], "NKG7")
        assert any("the first keeps the symbol" in note for note in table.notes)
        refused("no column 'names'", file=rna, proteins=proteins, columns={"symbols": "names"})

    def test_versions(self):
        rna, proteins = synthetic()
        table = CellTable.of(renamed(rna, var_names=[f"{name}.3" for name in ENSEMBL]), proteins)
        assert table.panel.genes == tuple(ENSEMBL)
        assert any("without their version" in note for note in table.notes)

    def test_entrez(self):
        rna, proteins = synthetic()
        table = CellTable.of(renamed(rna, var_names=[str(7 * i + 900) for i in range(40)]), proteins)
        assert any("Entrez ids" in note for note in table.notes)
        refused("genes have no names", file=renamed(rna, var_names=[str(i) for i in range(40)]), proteins=proteins)

    @pytest.mark.parametrize("names", [[f"ENSMUSG{i:011d}" for i in range(40)], [n.title() for n in symbols(40)]])
    def test_mouse(self, names):
        rna, proteins = synthetic()
        rna = renamed(rna, var_names=names)
        refused("mouse's by their look", "the model's are human's", "task.organism=mouse", file=rna, proteins=proteins)
        assert CellTable.of(rna, proteins, organism="mouse").panel.genes == tuple(names)
        assert CellTable.of(rna, proteins, organism=None).panel.genes == tuple(names)

    def test_numbered_names_are_no_mouse(self):
        rna, proteins = synthetic()
        assert CellTable.of(renamed(rna, var_names=[f"Gene{i}" for i in range(40)]), proteins)

    def test_human_genes_for_a_mouse_model(self):
        rna, proteins = synthetic()
        refused("human's by their look", "task.organism=human", file=rna, proteins=proteins, organism="mouse")

    def test_repeated(self):
        rna, proteins = synthetic()
        twice = ["CD3E", "CD3E", *symbols(40)[2:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rna = renamed(rna, var_names=twice)
            two = renamed(proteins, var_names=["p0", "p0", *proteins.var_names[2:]])
        error = refused("1 gene name stands more than once: CD3E", "var_names_make_unique()", file=rna, proteins=two)
        assert "1 protein name stands more than once: p0" in str(error)
        rna.var["gene_ids"] = ENSEMBL
        table = CellTable.of(rna, proteins)
        assert table.panel.genes[:3] == ("CD3E", ENSEMBL[1], "CD14")

    def test_empty_panels(self):
        rna, proteins = synthetic()
        refused("has no proteins: the panel is empty", file=rna, proteins=proteins[:, :0].copy())
        refused("has no genes", file=rna[:, :0].copy(), proteins=proteins)

    def test_several_kinds_in_one_matrix(self):
        rna, proteins = synthetic()
        rna.var["feature_types"] = ["Gene Expression"] * 36 + ["Antibody Capture"] * 4
        refused(
            "mixes columns of several kinds: 4 Antibody Capture, 36 Gene Expression",
            "split it",
            file=rna,
            proteins=proteins,
        )

    def test_ids_of_a_column(self):
        rna, proteins = synthetic()
        rna.var["my_Id"] = [float(i) if i else np.nan for i in range(40)]
        proteins.var["my_Id"] = range(1, 7)
        panel = CellTable.of(rna, proteins).panel
        assert panel.gene_ids == tuple(range(40))
        assert panel.protein_ids == (1, 2, 3, 4, 5, 6)
        rna.var["other"] = ["x", *range(39)]
        refused("holds 1 value that is no id: x", file=rna, proteins=proteins, columns={"gene_ids": "other"})
        refused(
            "neither a column of var nor a file",
            "did you mean my_Id?",
            file=rna,
            proteins=proteins,
            columns={"gene_ids": "my_id"},
        )

    def test_ids_of_a_table(self, tmp_path):
        rna, proteins = synthetic()
        (tmp_path / "ids.tsv").write_text("name\tid\nCD19\t7\nCD3E\t9\n")
        table = CellTable.of(rna, proteins, columns={"gene_ids": str(tmp_path / "ids.tsv")})
        assert table.panel.gene_ids[:3] == (9, 7, 0)
        assert any("2 of 40 names have an id" in note for note in table.notes)

    def test_tables_of_ids(self, tmp_path):
        file = tmp_path / "ids.csv"
        for text in ("CD3E,5\nCD19,6\n", "my_Id,symbol\n5,CD3E\n6,CD19\n", "\ufeffname,id\nCD3E,5\n\nCD19,6\n"):
            file.write_text(text, encoding="utf-8")
            assert read_id_table(file) == {"CD3E": 5, "CD19": 6}
        file.write_text("name,id\nCD3E,x\nCD19,6\nCD19,7\n")
        with pytest.raises(DataError, match=r"ids.csv:2: 'CD3E,x' is no name and id") as caught:
            read_id_table(file)
        assert "ids.csv:4: CD19 has another id, 6, above" in str(caught.value)
        file.write_text("")
        with pytest.raises(DataError, match="holds no name and id"):
            read_id_table(file)
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="no UTF-8"):
            read_id_table(file)

    def test_overlap(self):
        names = symbols(40)
        panel = Panel(tuple(names), ("CD3", "CD4"))
        assert overlap(panel, set(names)) == "40 of 40 genes (100%) are known to the model."
        assert "30 of 40 genes (75%)" in overlap(panel, names[:30])
        assert (
            overlap(panel, ["CD3", "CD8"], what="proteins", at_least=0.5)
            == "1 of 2 proteins (50%) are known to the model; unknown: CD4."
        )
        strange = [f"OTHER{i}X" for i in range(40)]
        for vocabulary, reason in (
            (names[:10] + strange, "another annotation or panel"),
            (ENSEMBL, "the data has symbols, the model knows Ensembl ids"),
            ([name.title() for name in names], "map the genes to their orthologues"),
        ):
            with pytest.raises(DataError, match=reason):
                overlap(panel, vocabulary)
        with pytest.raises(DataError, match=r"10 of 40 genes \(25%\).*fewer than 60%; unknown: .*task.overlap=0.25"):
            overlap(panel, names[:10] + strange)
        assert "100% of those that it knows" in overlap(panel, names[:10])
        with pytest.raises(DataError, match="version suffix"):
            overlap(Panel(tuple(ENSEMBL), ()), [f"{name}.1" for name in ENSEMBL])
        with pytest.raises(DataError, match="upper and lower case"):
            overlap(panel, [name.lower() for name in names[:4]] + names[4:12] + strange[:20])


class TestValues:
    def changed(self, at, value, side=0):
        pair = synthetic()
        pair[side].X = pair[side].X.toarray() if side == 0 else pair[side].X.copy()
        pair[side].X[at] = value
        return {"file": pair[0], "proteins": pair[1]}

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value):
        refused("1 value is not finite", "in cell cell5-1 at CD14", **self.changed((5, 2), value))

    def test_infinite_protein(self):
        refused("1 value is not finite", "in cell cell5-1 at p2", **self.changed((5, 2), np.inf, side=1))

    def test_too_large_for_single_precision(self):
        rna, proteins = synthetic()
        rna.X = rna.X.toarray().astype(np.float64)
        rna.X[3, 1] = 1e300
        refused("not finite", "cell3-1 at CD19", file=rna, proteins=proteins)

    def test_negative(self):
        refused("1 value is negative, down to -3", "differences, not counts", **self.changed((5, 2), -3))

    def test_scaled(self, tmp_path):
        rna, proteins = synthetic()
        rna.layers["counts"] = rna.X.copy()
        values = rna.X.toarray()
        rna.X = (values - values.mean(0)) / (values.std(0) + 1)
        refused("z-scored", "data.columns={layer: counts}", file=rna, proteins=proteins)
        refused("z-scored", file=write_pair(tmp_path, rna, proteins)[0], with_proteins=False, memory_bytes=0)

    def test_normalised(self):
        rna, proteins = synthetic()
        values = rna.X.toarray()
        rna.X = values / values.sum(1, keepdims=True) * 1e4
        refused(
            "normalised values (each cell sums to about 1e+04)", "this one has no layers", file=rna, proteins=proteins
        )

    def test_fractions_of_any_kind(self):
        refused("1 value is no whole numbers", "first 0.5 in cell cell5-1 at CD14", **self.changed((5, 2), 0.5))

    def test_proteins_that_are_no_counts(self):
        given = self.changed((5, 2), 0.5, side=1)
        refused("not counts", "protein_layer", **given)
        assert read_cells(**given, protein_values="any").measured

    def test_both_sides_are_told_at_once(self):
        rna, proteins = synthetic()
        rna.X = rna.X * 0.5
        proteins.X = proteins.X - 1000
        assert len(refused("AnnData", file=rna, proteins=proteins).faults) == 2

    def test_empty_cells_and_still_proteins(self):
        rna, proteins = synthetic()
        rna.X = sparse.csr_matrix(rna.X.toarray() * (np.arange(120) > 2)[:, None])
        proteins.X[:, 0], proteins.X[:, 1], proteins.X[:, 2] = 0, 4, np.nan
        table = CellTable.of(rna, proteins)
        said = "\n".join(table.notes)
        assert "3 cells have no RNA count" in said
        assert "1 protein is zero in every cell: p0" in said
        assert "1 protein is the same in every cell: p1" in said
        assert "1 protein is never measured: p2" in said
        assert table.constant == ("p0", "p1", "p2")

    def test_nothing_at_all(self):
        rna, proteins = synthetic()
        refused(
            "no gene is counted in any of 120 cells",
            file=anndata.AnnData(rna.X * 0, obs=rna.obs, var=rna.var),
            proteins=proteins,
        )
        proteins.X[:] = 1
        refused("no protein differs between any two cells", file=rna, proteins=proteins)

    def test_many_blocks(self, tmp_path, monkeypatch):
        monkeypatch.setattr("metier.data.cells.matrix.VALUES_AT_ONCE", 400)
        rna, proteins = synthetic()
        rna.X = rna.X.toarray()
        rna.X[77, 3] = -1
        refused(
            "cell cell77-1 at NKG7", file=write_pair(tmp_path, rna, proteins)[0], with_proteins=False, memory_bytes=0
        )


class TestTransforms:
    counts_BP = np.array([[0, 3, 8, 1], [5, np.nan, 5, 0], [2, 2, 2, 2], [np.nan] * 4], np.float32)

    @pytest.mark.parametrize("name", ["clr", "log1p", "minmax", "none"])
    def test_there_and_back(self, name):
        transform = Transform(name)
        there = transform.apply(self.counts_BP)
        assert there.dtype == np.float32
        assert np.array_equal(np.isnan(there), np.isnan(self.counts_BP))
        back = transform.inverse(there, self.counts_BP if transform.needs_like else None)
        assert np.allclose(back, self.counts_BP, atol=1e-5, equal_nan=True)

    def test_their_formulas(self):
        clr = Transform("clr").apply(self.counts_BP)
        x_P = self.counts_BP[0]
        assert np.allclose(clr[0], np.log1p(x_P / np.exp(np.log1p(x_P).mean())))
        seen_P = self.counts_BP[1][~np.isnan(self.counts_BP[1])]
        kept_P = clr[1][~np.isnan(self.counts_BP[1])]
        assert np.allclose(kept_P, np.log1p(seen_P / np.exp(np.log1p(seen_P).mean())))
        scaled = Transform("minmax").apply(self.counts_BP)
        assert scaled[0].min() == pytest.approx(1e-8)
        assert scaled[0].max() == 1
        assert np.allclose(scaled[2], 1e-8)

    def test_no_way_back(self):
        for name in ("clr", "minmax"):
            with pytest.raises(DataError, match="no way back without measured counts"):
                Transform(name).inverse(self.counts_BP)
        with pytest.raises(DataError, match="'CLR' is no transform"):
            Transform("CLR")

    def test_log_normalise(self):
        counts = sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0]], np.float32))
        found = log_normalise(counts)
        assert found.dtype == np.float32
        assert np.allclose(found.toarray(), np.log1p([[2500, 7500, 0], [0, 0, 0]]))
        assert counts.toarray().tolist() == [[1, 3, 0], [0, 0, 0]]


def share_nothing(found, total):
    every = np.concatenate(list(found.values()))
    assert len(every) == total
    assert len(np.unique(every)) == total


class TestSplits:
    def table(self, donors, cells=200):
        return CellTable.of(*synthetic(cells=cells, donors=donors))

    def test_one_donor_is_drawn_by_type(self):
        table = self.table(1)
        found, notes = split_cells(table, 0.1, 0.2, seed=0)
        share_nothing(found, 200)
        assert [len(found[name]) for name in ("train", "validation", "test")] == [140, 20, 40]
        types = table.obs["cell_type"]
        for kind in set(types):
            assert abs((types[found["test"]] == kind).mean() - (types == kind).mean()) < 0.03
        assert (
            "at random, in equal shares of each cell type (from the donors that are learnt: only one donor)" in notes[0]
        )

    def test_two_donors(self):
        table = self.table(2)
        found, notes = split_cells(table, 0.1, 0.2, seed=0)
        share_nothing(found, 200)
        donors = table.obs["donor"]
        assert set(donors[found["test"]]).isdisjoint(set(donors[found["train"]]) | set(donors[found["validation"]]))
        assert set(donors[found["validation"]]) == set(donors[found["train"]])
        assert re.match(r"test is every cell of donor P\d: 100 cells \(50%\)\.", notes[0])
        assert "only 1 donor is left" in notes[1]

    def test_many_donors(self):
        table = self.table(8)
        found, _ = split_cells(table, 0.25, 0.25, seed=3)
        share_nothing(found, 200)
        donors = [set(table.obs["donor"][rows]) for rows in found.values()]
        assert sum(map(len, donors)) == 8
        assert [len(rows) for rows in found.values()] == [100, 50, 50]

    def test_the_seed_decides(self):
        table = self.table(8)
        draws = [split_cells(table, 0.1, 0.1, seed=seed)[0]["test"].tolist() for seed in (0, 0, 1, 2, 3)]
        assert draws[0] == draws[1]
        assert len({tuple(draw) for draw in draws}) > 1

    @pytest.mark.parametrize("group", ["", "none"])
    def test_at_random_when_told(self, group):
        found, _ = split_cells(self.table(2), 0.1, 0.1, seed=0, group=group)
        assert [len(rows) for rows in found.values()] == [160, 20, 20]

    def test_no_test_share(self):
        found, _ = split_cells(self.table(2), 0.1, 0, seed=0)
        assert set(found) == {"train", "validation"}

    def test_groups_that_cannot_be(self):
        rna, proteins = synthetic(cells=200)
        rna.obs["site"] = "x"
        rna.obs["clinic"] = [None if i < 3 else f"c{i % 3}" for i in range(200)]
        table = CellTable.of(rna, proteins, group="site")
        with pytest.raises(DataError, match="every cell has the site 'x'"):
            split_cells(table, 0.1, 0.1, seed=0, group="site")
        with pytest.raises(DataError, match="obs has no column 'plate'"):
            split_cells(table, 0.1, 0.1, seed=0, group="plate")
        table = CellTable.of(rna, proteins, group="clinic")
        with pytest.raises(DataError, match="3 cells name no clinic"):
            split_cells(table, 0.1, 0.1, seed=0, group="clinic")

    def test_shares_that_cannot_be(self):
        table = self.table(1, cells=8)
        with pytest.raises(DataError, match=r"8 cells are too few to set 1% aside for test .* at least 51 cells"):
            split_cells(table, 0.1, 0.01, seed=0)
        with pytest.raises(DataError, match="nothing is left to learn from"):
            split_cells(table, 0.5, 0.5, seed=0)
        assert any("has only 1 cell" in note for note in split_cells(table, 0, 0.1, seed=0)[1])


class TestRanks:
    def test_every_row_and_equal_numbers(self):
        rows = np.arange(100, 203)
        parts = [rank_rows(rows, rank, 4, seed=1, epoch=0) for rank in range(4)]
        assert {len(part) for part in parts} == {26}
        assert set(np.concatenate(parts)) == set(rows)
        dropped = [rank_rows(rows, rank, 4, seed=1, epoch=0, drop_last=True) for rank in range(4)]
        assert {len(part) for part in dropped} == {25}
        assert len(set(np.concatenate(dropped))) == 100

    def test_each_epoch_has_its_own_order(self):
        rows = np.arange(50)
        first, again, next_one = (rank_rows(rows, 0, 1, seed=1, epoch=epoch) for epoch in (0, 0, 1))
        assert first.tolist() == again.tolist() != next_one.tolist()
        assert sorted(next_one) == list(range(50))

    def test_more_processes_than_rows(self):
        assert [len(rank_rows(np.arange(2), rank, 5, seed=0, epoch=0)) for rank in range(5)] == [1] * 5
        for given in ({"drop_last": True}, {"rank": 5}):
            with pytest.raises(DataError):
                rank_rows(np.arange(2), **{"rank": 0, "world_size": 5, "seed": 0, "epoch": 0} | given)
        with pytest.raises(DataError, match="0 cells for 2 processes"):
            rank_rows(np.arange(0), 0, 2, seed=0, epoch=0)


FACTS = {
    "run": "runs/x",
    "transform": "clr",
    "genes": 40,
    "shares": [0.1, 0.2],
    "none": None,
    "deep": {"a/b": True},
}


class TestPredictions:
    def pieces(self, cells=120, width=6):
        chance = np.random.default_rng(0)
        values = chance.normal(size=(cells, width)).astype(np.float32)
        order = chance.permutation(cells)
        return values, [(order[i : i + 50], values[order[i : i + 50]]) for i in range(0, cells, 50)]

    def sources(self, folder):
        rna, proteins = synthetic()
        file, _ = write_pair(folder, rna, proteins)
        return rna, (file, write_h5mu(folder / "both.h5mu", rna=rna, prot=proteins), rna, muon(rna=rna, prot=proteins))

    @pytest.mark.parametrize("kind", range(4))
    def test_are_read_by_anndata(self, tmp_path, kind):
        rna, sources = self.sources(tmp_path)
        values, pieces = self.pieces()
        names = [f"p{i}" for i in range(6)]
        path = write_predictions(sources[kind], pieces, names, tmp_path / "new" / "out.h5ad", FACTS)
        read = anndata.read_h5ad(path)
        assert np.array_equal(read.obsm["protein_predicted"], values)
        assert read.obsm["protein_predicted"].dtype == np.float32
        assert read.obs_names.tolist() == rna.obs_names.tolist()
        assert read.var_names.tolist() == rna.var_names.tolist()
        assert read.obs["Donor_ID"].tolist() == rna.obs["Donor_ID"].tolist()
        assert (read.X != rna.X).nnz == 0
        stated = read.uns["metier"]
        assert list(stated["proteins"]) == names
        assert stated["transform"] == "clr"
        assert stated["genes"] == 40
        assert stated["deep"]["a_b"]
        assert stated["X"] == "copied from the source"
        assert [file.name for file in path.parent.iterdir()] == ["out.h5ad"]

    @pytest.mark.parametrize("kind", range(4))
    def test_a_large_matrix_is_left_out_and_gaps_are_counted(self, tmp_path, kind):
        _, sources = self.sources(tmp_path)
        _, pieces = self.pieces()
        path = write_predictions(sources[kind], pieces[:1], list("abcdef"), tmp_path / "out.h5ad", {}, matrix_bytes=10)
        read = anndata.read_h5ad(path)
        assert read.X is None
        assert read.shape == (120, 40)
        assert read.uns["metier"]["cells_without_prediction"] == 70
        assert read.uns["metier"]["X"].startswith("left out")
        assert np.isnan(read.obsm["protein_predicted"]).any(axis=1).sum() == 70

    def test_nothing_is_written_where_something_is_wrong(self, tmp_path):
        _, sources = self.sources(tmp_path)
        values, pieces = self.pieces()
        out = tmp_path / "out.h5ad"
        first = (np.arange(5), values[:5])
        for wrong, said in (
            ([(np.arange(5), values[:5, :3])], r"shape \(5, 3\) for 5 cells and 6 proteins"),
            ([first, first], "predicted twice"),
            ([(np.arange(118, 123), values[:5])], "for cell 122 of a source that has 120 cells"),
            ([(np.arange(5), values[:5] * np.nan)], "30 predictions are not finite"),
        ):
            with pytest.raises(DataError, match=said):
                write_predictions(sources[0], wrong, list("abcdef"), out, {})
            assert not out.exists()
        with pytest.raises(DataError, match="is the file that was predicted from"):
            write_predictions(sources[0], pieces, list("abcdef"), sources[0], {})
        with pytest.raises(DataError, match="no proteins to write"):
            write_predictions(sources[0], [], [], out, {})
        assert not list(tmp_path.glob(".*"))

    def test_of_a_modality_of_any_name(self, tmp_path):
        rna, proteins = synthetic()
        odd = write_h5mu(tmp_path / "odd.h5mu", one=rna, two=proteins)
        values, pieces = self.pieces()
        with pytest.raises(DataError, match="which of these is RNA is not clear"):
            write_predictions(odd, pieces, list("abcdef"), tmp_path / "out.h5ad", {})
        path = write_predictions(odd, pieces, list("abcdef"), tmp_path / "out.h5ad", {}, modality="one")
        assert np.array_equal(anndata.read_h5ad(path).obsm["protein_predicted"], values)

    def test_of_a_table_that_dropped_cells(self, tmp_path):
        rna, proteins = synthetic()
        file, other = write_pair(tmp_path, rna, proteins[20:].copy())
        table = read_cells(file, other)
        values, _ = self.pieces()
        rows = np.arange(10)
        path = write_predictions(
            file, [(table.source_rows(rows), values[:10])], list("abcdef"), tmp_path / "o.h5ad", {}
        )
        read = anndata.read_h5ad(path)
        assert np.array_equal(read[table.names[:10]].obsm["protein_predicted"], values[:10])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("pbmc10k_cite", (6855, 4000, 14)),
            ("pbmc_wnn_cite", (800, 500, 224)),
            ("bmmc_cite", (600, 1000, 134)),
            ("pbmc10k_cite_mini200", (200, 16_727, 14)),
            ("pbmc_eccite", (500, 11_980, 49)),
        ],
    )
    def test_are_read_alike_from_disk_and_memory(self, name, shape):
        file = REAL / f"{name}.h5mu"
        if not file.is_file():
            pytest.skip(f"{file.name} is not here")
        kept, left = read_cells(file), read_cells(file, memory_bytes=0)
        assert (len(kept), len(kept.panel.genes), len(kept.panel.proteins)) == shape
        assert left.on_disk
        assert not kept.on_disk
        assert kept.fingerprint() == left.fingerprint()
        rows = np.random.default_rng(0).permutation(len(kept))[:64]
        assert (kept.rna(rows) != left.rna(rows)).nnz == 0
        original = anndata.io.read_elem(h5py.File(file)["mod/rna/X"])
        assert (original[rows] != left.rna(rows)).nnz == 0

    def test_donors_stay_apart(self):
        table = read_cells(REAL / "bmmc_cite.h5mu")
        found, _ = split_cells(table, 0.1, 0.2, seed=0)
        donors = table.obs["donor"]
        assert set(donors[found["test"]]).isdisjoint(donors[found["train"]])

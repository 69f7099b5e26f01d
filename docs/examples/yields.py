"""Reaction yields from RXNMapper's encoder: a network and a task of one's own."""

import re
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AlbertConfig, AlbertModel

from metier import ValueTask

ATOM = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|>>|.")  # Source: Schwaller et al. 2019, doi:10.1021/acscentsci.9b00576


class YieldNet(torch.nn.Module):
    """The pretrained encoder, and one new layer on its first token."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.albert = AlbertModel(AlbertConfig.from_pretrained(folder), add_pooling_layer=False)
        self.head = torch.nn.Linear(self.albert.config.hidden_size, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.albert(ids, attention_mask=mask).last_hidden_state[:, 0])


class Yields(ValueTask):
    """From a row with `rxn` and `yield` to token ids and a number."""

    names = ("yield",)

    def __init__(self, vocabulary: str) -> None:
        self.ids = {token: i for i, token in enumerate(Path(vocabulary).read_text("utf-8").split("\n"))}

    def example(self, row):
        tokens = ["[CLS]", *ATOM.findall(row["rxn"]), "[SEP]"]
        return torch.tensor([self.ids.get(token, self.ids["[UNK]"]) for token in tokens]), float(row["yield"])

    def size(self, example):
        return len(example.content[0])

    def batch(self, contents):
        ids = pad_sequence([ids for ids, _ in contents], batch_first=True)
        return {"ids": ids, "mask": (ids != 0).long()}, torch.tensor([number for _, number in contents])

"""Edits and journals as data."""

import json
import pickle

import pytest
import torch

from lightning_compress.core.errors import ConfigurationError, JournalMismatchError
from lightning_compress.core.hooks import decode_journal, encode_journal
from lightning_compress.core.journal import FORMAT_VERSION, Edit, Journal

A = Edit("slice", "net.0", config={"tensors": {"weight": {"0": [[0, 3], 5]}}, "attributes": {"out_features": 5}})
B = Edit("replace", "net.1", "low_rank", {"rank": 4, "names": ("a", "b"), "scale": 0.5})
C = Edit("bake", "net.1")


def test_json_round_trip_and_plain_configs() -> None:
    journal = Journal((A, B, C))
    assert Journal.from_json(journal.to_json()) == journal
    assert B.config == {"rank": 4, "names": ["a", "b"], "scale": 0.5}
    assert json.loads(journal.to_json())["version"] == FORMAT_VERSION
    assert [edit.verb for edit in journal] == ["slice", "replace", "bake"]
    assert Journal().add(A).add(B, C) == journal
    assert not Journal()


def test_unicode_survives_the_tensor() -> None:
    journal = Journal((Edit("bake", "größe.0", config={"tensor": "名"}),))
    tensor = encode_journal(journal)
    assert (tensor.dtype, tensor.dim()) == (torch.uint8, 1)
    assert decode_journal(tensor) == journal


def test_edits_are_frozen_and_pickle() -> None:
    assert pickle.loads(pickle.dumps(Journal((A, B)))) == Journal((A, B))
    with pytest.raises(AttributeError):
        A.path = "x"


def test_config_does_not_follow_later_changes_of_its_source() -> None:
    source = {"sizes": [1, 2]}
    edit = Edit("replace", "a", "k", source)
    source["sizes"].append(3)
    assert edit.config == {"sizes": [1, 2]}


@pytest.mark.parametrize("config", [{"x": torch.ones(1)}, {"x": float("nan")}, {"x": {1, 2}}, {"x": b"a"}])
def test_configs_must_be_json(config: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"`config` of the replace edit at 'a'.*JSON"):
        Edit("replace", "a", "k", config)


def test_unknown_verb() -> None:
    with pytest.raises(ConfigurationError, match=r"`verb` is 'slce'.*did you mean 'slice'"):
        Edit("slce", "a")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_a_newer_version_is_refused(version: int) -> None:
    with pytest.raises(JournalMismatchError, match=rf"version {version}.*install a newer"):
        Journal.from_json(json.dumps({"version": version, "edits": []}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"version": 1}',
        '{"edits": []}',
        '{"version": "1", "edits": []}',
        '{"version": true, "edits": []}',
        '{"version": 0, "edits": []}',
        '{"version": 1, "edits": 3}',
        '{"version": 1, "edits": ["a"]}',
        '{"version": 1, "edits": [{"verb": "run", "path": "a"}]}',
        '{"version": 1, "edits": [{"verb": "bake"}]}',
        '{"version": 1, "edits": [{"verb": "bake", "path": "a", "code": "x"}]}',
        '{"version": 1, "edits": [{"verb": "bake", "path": "a", "config": [1]}]}',
    ],
)
def test_damaged_text_is_one_clear_error(text: str) -> None:
    with pytest.raises(JournalMismatchError, match="not a compression journal"):
        Journal.from_json(text)


@pytest.mark.parametrize(
    "entry", [torch.ones(3), torch.zeros(2, 2, dtype=torch.uint8), "text", torch.tensor([255, 254], dtype=torch.uint8)]
)
def test_damaged_tensors_are_one_clear_error(entry: object) -> None:
    with pytest.raises(JournalMismatchError, match="damaged"):
        decode_journal(entry)


def test_what_is_missing_is_the_rest_after_a_common_prefix() -> None:
    assert Journal((A, B, C)).missing_from(Journal((A,))) == (B, C)
    assert Journal((A,)).missing_from(Journal((A,))) == ()


def test_the_first_differing_edit_is_named() -> None:
    with pytest.raises(JournalMismatchError, match=r"edit 2 differs: the model has bake at 'net.1'.*replace low_rank"):
        Journal((A, B)).missing_from(Journal((A, C)))
    with pytest.raises(JournalMismatchError, match=r"edit 2 differs.*no further edit"):
        Journal((A,)).missing_from(Journal((A, B)))


def test_a_journal_seen_from_a_parent() -> None:
    assert A.at("model").path == "model.net.0"
    assert A.at("") == A
    assert Edit("bake", "").at("model").path == "model"

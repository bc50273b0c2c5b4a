"""Configurations from outside: limits, types and ranges, and what none of them may do to a text encoder."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mrflow as mf
from mrflow.checkpoints import configs
from mrflow.checkpoints.configs import Config, parse_config, read_config
from mrflow.checkpoints.safetensors import Header, read_header, save_file
from mrflow.errors import ResourceError, WeightsError
from mrflow.models.encoders import make_config
from mrflow.models.fp8 import with_scales
from mrflow.models.scheduler import shift_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 40 + "1" + "}" * 40, "nests its values more than 32 deep"),
        ("[1]", "no table"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1e999}', "1e999 is no number"),
        ('{"a": [9223372036854775808]}', "holds the number 9223372036854775808, beyond any"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON that can be used"),
        ('{"a": "\udc80"}', "not JSON that can be used"),
        ("", "not JSON that can be used"),
    ],
)
def test_what_no_setting_holds_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"metadata.*{words}"):
        parse_config(text, "its metadata")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(WeightsError, match=rf"config.json.*{words}"):
        read_config(tmp_path / "config.json")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "é"}).encode())
    assert dict(read_config(tmp_path / "c.json")) == {"a": "é"}


def test_size_and_count_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MAX_VALUES", 100)
    parse_config(json.dumps({"a": [1] * 99}), "x")
    with pytest.raises(WeightsError, match="x holds more than 100 values"):
        parse_config(json.dumps({"a": [1] * 100}), "x")
    monkeypatch.setattr(configs, "MAX_BYTES", 100)
    (tmp_path / "config.json").write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(WeightsError, match="config.json is larger than 100 bytes"):
        read_config(tmp_path / "config.json")


def test_only_regular_files_are_read_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text('{"a": 1}')
    for name, to in (("hub", "real.json"), ("loop", "loop"), ("zero", "/dev/zero"), ("gone", "nowhere")):
        (tmp_path / name).symlink_to(to)
    assert dict(read_config(tmp_path / "hub")) == {"a": 1}
    with pytest.raises(WeightsError, match="gone does not exist"):
        read_config(tmp_path / "gone")
    for name in ("loop", "zero", ""):
        with pytest.raises(ResourceError, match="cannot be read"):
            read_config(tmp_path / name)


ASKED: dict[str, tuple[Callable[[Config], object], object, list[object]]] = {
    "number": (lambda c: c.number("x", low=0), 2.5, ["2", True, -1, [1], 1e9]),
    "whole": (lambda c: c.whole("x"), 3, ["3", True, 0, 1.5, 1 << 25]),
    "numbers": (lambda c: c.numbers("x", count=2), [1, 0.5], [[1], [1, "a"], "ab", 3, [1, 1e9], [1, True]]),
    "wholes": (lambda c: c.wholes("x", most=2), [1, 2], [[], [1, 2, 3], [0], [1.0], "ab", 3, [1 << 17]]),
}


@pytest.mark.parametrize("kind", ASKED)
def test_settings_are_asked_for_by_type_and_range(kind: str) -> None:
    ask, right, wrong = ASKED[kind]
    found = ask(Config({"x": right}, "c.json"))
    assert (list(found) if isinstance(found, tuple) else found) == right
    for value in (*wrong, None):
        with pytest.raises(WeightsError, match=rf"c\.json: x must be .*, got {'nothing' if value is None else ''}"):
            ask(Config({"x": value}, "c.json"))
    assert Config({"x": None}, "").number("x", 4.0) == 4.0


DYNAMIC = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": "false"}, {"use_dynamic_shifting": "false"}, {"_class_name": "UniPCMultistepScheduler",
         "use_flow_sigmas": "false"}, {"shift": 0}, {"shift_terminal": 1.0},
        DYNAMIC | {"time_shift_type": "cosine"}, DYNAMIC | {"time_shift_type": 5},
        DYNAMIC | {"base_image_seq_len": 4096},
        {"shift": "3"}, {"shift": [3]}, {"shift": True}, {"shift_terminal": 7},
        {"use_dynamic_shifting": True, "base_shift": None},
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.1, "base_image_seq_len": 2.5,
         "max_image_seq_len": 4096},
    ],
)  # fmt: skip
def test_schedulers_are_held_to_types(settings: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"scheduler_config.json cannot be used: [^(]* must be [a-z]"):
        shift_of(settings, "folder")


@pytest.mark.parametrize("way", ["sde-dpmsolver", "sde-dpmsolver++"])
def test_multistep_solvers_that_add_noise_are_refused_by_name(way: str) -> None:
    settings = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert shift_of(settings | {"algorithm_type": "dpmsolver++"}, "folder") == mf.Shift.fixed(3.0)
    with pytest.raises(WeightsError, match=re.escape(f"algorithm_type='{way}', fresh noise in every step")):
        shift_of(settings | {"algorithm_type": way}, "folder")


def test_flags_may_be_numbers_and_curves_have_names() -> None:
    assert shift_of(DYNAMIC | {"use_dynamic_shifting": 1, "use_karras_sigmas": 0, "invert_sigmas": None}, "") == (
        mf.Shift(0.5, 1.15)
    )
    with pytest.raises(mf.PlanError, match="a shift's kind must be exponential or linear, got 'cosine'"):
        mf.Shift(0.5, 1.15, kind="cosine")  # type: ignore[arg-type]
    with pytest.raises(mf.PlanError, match="a shift's low must be a finite number"):
        mf.Shift(float("nan"), 1.15)


class Spy:
    """A configuration of transformers that says what it was made of."""

    given: dict[str, Any]

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Spy":
        """Keep it."""
        made = cls()
        made.given = given
        return made


HEADER = Header(Path("text.safetensors"), {})


def test_a_text_encoders_configuration_fetches_nothing_and_makes_nothing_large() -> None:
    """An attention that is named like a repository would be fetched and run; labels and layers become tables."""
    said = {
        "hidden_act": "gelu",
        "attn_implementation": "owner/kernels",
        "auto_map": {"AutoModel": "x.py"},
        "num_labels": 9,
    }
    inside = {"vision_config": {"num_labels": 10**9, "depth": 32}}
    made = make_config(Spy, HEADER, said | inside, {})
    assert made.given == {"hidden_act": "gelu", "vision_config": {"depth": 32}}
    for name, value in (("num_hidden_layers", 1001), ("depth", 10**6), ("max_position_embeddings", 1 << 25)):
        with pytest.raises(WeightsError, match=rf"has {name} {value}, (1000|16777216) at most"):
            make_config(Spy, HEADER, {"text_config": {name: value}}, {})


def test_a_large_tensor_is_no_text(tmp_path: Path) -> None:
    text = b'{"format": "float8_e4m3fn"}'.ljust(1 << 17)
    save_file({"a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="what it says of its quantised layers cannot be read"):
        with_scales(header)

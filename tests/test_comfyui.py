"""The ComfyUI nodes without ComfyUI: their declarations hold together, and the workflow draws what the chain draws."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mrflow as mf
from mrflow.errors import ChainError, PlanError

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The folder, imported as ComfyUI imports a custom node."""
    spec = importlib.util.spec_from_file_location("mrflow_nodes", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mrflow_nodes"] = module
    spec.loader.exec_module(module)
    return module


def test_every_node_declares_what_it_takes(nodes: ModuleType) -> None:
    import inspect

    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES), name
        function = node.stage if hasattr(node, "stage") else getattr(node, node.FUNCTION)
        taken = set(inspect.signature(function).parameters) - {"self"}
        given = set(inputs["required"]) | set(inputs["optional"])
        assert given - {"chain"} == taken - {"chain"}, name
    assert sum(len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")) < 300


def follow(nodes: ModuleType, workflow: dict[str, Any]) -> dict[str, Any]:
    """Every node of ours, in order, with its links resolved."""
    done: dict[str, Any] = {}
    for number in sorted(workflow, key=int):
        entry = workflow[number]
        node = nodes.NODE_CLASS_MAPPINGS.get(entry["class_type"])
        if node is None:
            continue
        kinds = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES()["optional"]}
        given: dict[str, Any] = {}
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                source = workflow[value[0]]["class_type"]
                assert nodes.NODE_CLASS_MAPPINGS[source].RETURN_TYPES[value[1]] == kinds[name][0]
                given[name] = done[value[0]][value[1]]
            else:
                given[name] = value
        done[number] = getattr(node(), node.FUNCTION)(**given)
    return done


def on_pocket(**run: Any) -> dict[str, Any]:
    """The workflow that is shipped, on the embedded model and at small sizes; `run` are settings of its Run."""
    workflow: dict[str, Any] = json.loads((FOLDER / "twelve_plus_one.json").read_text())
    workflow["1"]["inputs"] |= {"where": "pocket", "dtype": "float32"}
    workflow["2"]["inputs"] |= {"height": 64, "width": 64}
    workflow["4"]["inputs"] |= {"net": "lanczos", "height": 128, "width": 128}
    workflow["9"]["inputs"] |= {"prompt": "a big red circle", "batch": 2, "seed": 5, **run}
    return workflow


def in_python(seeds: list[int]) -> mf.Result:
    """What that workflow draws, by mrflow's own words."""
    chain = mf.recipes.paper(mf.Lanczos(2), low=(64, 64), size=(128, 128))
    return mf.run(chain, mf.load("pocket"), "a big red circle", seed=seeds)


def test_the_workflow_draws_what_the_recipe_draws(nodes: ModuleType) -> None:
    images, plan = follow(nodes, on_pocket())["9"]
    want = in_python([5, 6])
    assert images.shape == (2, 128, 128, 3)
    torch.testing.assert_close(images, want.pixels.permute(0, 2, 3, 1))
    assert plan == str(want.plan)


def test_mistakes_are_told_in_words(nodes: ModuleType) -> None:
    made = nodes.NODE_CLASS_MAPPINGS
    (chain,) = made["MrflowSample"]().make(64, 64, 2, "Euler")
    with pytest.raises(ChainError, match=r"Put Decode\(\) between them"):
        made["MrflowUpscale"]().make(chain, net="lanczos", height=128, width=128)
    with pytest.raises(PlanError, match="enlarges latents; this node goes over pixels"):
        made["MrflowUpscale"]().make(chain >> mf.Decode(), net="latent-nearest", height=128, width=128)
    with pytest.raises(PlanError, match="^net takes own, nearest, .*; got 'foo'"):
        made["MrflowUpscale"]().make(chain >> mf.Decode(), net="foo", height=128, width=128)
    with pytest.raises(PlanError, match="^lora style.safetensors:1e9: .*strength must be a number from -100 to 100"):
        made["MrflowSample"]().make(64, 64, 2, lora="style.safetensors:1e9")
    with pytest.raises(PlanError, match="chain ended in"):
        made["MrflowRun"]().make(mf.load("pocket"), chain, "a red circle", 0, 1)


def test_an_upscaler_of_latents_is_refused(nodes: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import mrflow as mf\nclass Twice(mf.LatentUpscaler):\n    space, scale = 'pocket', 2\n"
        "    def __call__(self, latents):\n        return latents\ntwice = Twice()\n"
    )
    with pytest.raises(PlanError, match="mine.py:twice enlarges latents; this node goes over pixels"):
        nodes.NODE_CLASS_MAPPINGS["MrflowUpscale"]().stage(f"{tmp_path}/mine.py:twice", 128, 128)


def test_a_negative_prompt_that_nothing_reads_is_refused_and_a_blank_one_is_not(nodes: ModuleType) -> None:
    run, model = nodes.NODE_CLASS_MAPPINGS["MrflowRun"]().make, mf.load("pocket")
    one, two = (mf.Sample(64, 64, mf.Shifted(2), guidance=mf.CFG(g)) >> mf.Decode() for g in (1, 4))
    with pytest.raises(PlanError, match="negative does nothing with this chain: pocket.* draws without a second"):
        run(model, one, "a red circle", 0, 1, negative="a blue ring")
    plain, said = (run(model, two, "a red circle", 0, 1, negative=n)[0] for n in ("", "a blue ring"))
    assert not torch.equal(plain, said)
    assert run(model, one, "a red circle", 0, 1, negative=" \n")[0].shape == plain.shape


def test_slots_are_read_by_the_public_parser(nodes: ModuleType) -> None:
    made = nodes.NODE_CLASS_MAPPINGS
    (chain,) = made["MrflowSample"]().make(
        64, 64, 3, solver="Heun", schedule="Karras(rho=5)", guidance="CFG(3)", cache="TeaCache"
    )
    want = mf.Sample(
        64, 64, mf.Karras(3, rho=5), solver=mf.Heun(), guidance=mf.CFG(3), cache=mf.caches.TeaCache(),
    )  # fmt: skip
    assert chain.stages == (want,)
    (longer,) = made["MrflowRefine"]().make(chain >> mf.Reinject(0.2), steps=2, schedule="Linear", guidance="Distilled")
    assert longer.stages[-1] == mf.Refine(mf.Linear(2), guidance=mf.Distilled())
    with pytest.raises(PlanError, match="did you mean Heun"):
        made["MrflowSample"]().make(64, 64, 3, solver="heun")

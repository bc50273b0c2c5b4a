"""Running: seeds, batches, events, starts, the stage cache."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mrflow as mf
from mrflow import runner
from mrflow.solvers import History
from mrflow.testing import Toy

CHAIN = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=4)
TOY = mf.toy()


class Counting(Toy):
    """A toy that counts the evaluations of its fields."""

    calls = 0

    def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> mf.Velocity:
        inner = super().field(cond, options)

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            self.calls += 1
            return inner(x, sigma)

        return velocity


@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=4), where=st.integers(0, 3))
def test_a_picture_does_not_depend_on_its_batch(seeds: list[int], where: int) -> None:
    where %= len(seeds)
    prompts = [f"p{s % 3}" for s in seeds]
    whole = mf.run(CHAIN, TOY, prompts, seed=seeds).pixels[where]
    alone = mf.run(CHAIN, TOY, prompts[where], seed=seeds[where]).pixels[0]
    assert torch.allclose(whole, alone, atol=1e-6)


def test_seeds_and_prompts_pair_up() -> None:
    assert mf.run(CHAIN, TOY, "a", seed=[1, 2, 3]).seeds == (1, 2, 3)
    assert mf.run(CHAIN, TOY, ["a", "b"], seed=7).seeds == (7, 7)
    one, two = mf.run(CHAIN, TOY, "a", seed=[1, 2]).pixels
    assert not torch.equal(one, two)
    with pytest.raises(mf.PlanError, match="2 prompts and 3 seeds do not pair up"):
        mf.run(CHAIN, TOY, ["a", "b"], seed=[1, 2, 3])
    for bad in (-1, 2**63, 1.5, True):
        with pytest.raises((mf.PlanError, TypeError)):
            mf.run(CHAIN, TOY, "a", seed=[bad])  # type: ignore[list-item]
    with pytest.raises(mf.PlanError, match="empty list"):
        mf.run(CHAIN, TOY, [])


@pytest.mark.parametrize(
    "given",
    [{"prompt": 3}, {"seed": 1.5}, {"seed": "7"}, {"condition": "x"}, {"cache": "folder"}, {"on_event": 3}],
    ids=str,
)
def test_arguments_of_another_kind_are_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(mf.PlanError, match=f"{name} must be"):
        mf.run(CHAIN, TOY, **{"prompt": "a", **given})


@pytest.mark.parametrize("solver", [mf.Euler(), mf.Heun(), mf.RK4(), mf.AB3(), mf.DPMpp2M(), mf.StochasticEuler(0.3)])
def test_the_planned_forwards_are_the_real_ones(solver: mf.Solver) -> None:
    model = Counting()
    chain = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=5, refine_steps=2, solver=solver)
    result = mf.run(chain, model, "a")
    assert model.calls == result.nfe == mf.plan(chain, model.info).nfe


def test_run_keeps_what_the_plan_says() -> None:
    result = mf.run(CHAIN, TOY, ["a", "b"], keep=True)
    for row, stage in zip(mf.plan(CHAIN, TOY.info, batch=2).rows, result.stages, strict=True):
        assert stage.spec == row.out
        assert stage.data is not None
        assert tuple(stage.data.shape) == row.out.shape
    assert result.seconds >= sum(s.seconds for s in result.stages)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    mf.run(CHAIN, TOY, "a")
    assert torch.equal(before, torch.get_rng_state())


def test_adding_a_stage_of_another_kind_moves_nobodys_noise() -> None:
    quantised = CHAIN[:2] >> mf.Quantise() >> CHAIN[2:]  # type: ignore[operator]
    a = mf.run(CHAIN, TOY, "a", keep=True).stages[0].data
    b = mf.run(quantised, TOY, "a", keep=True).stages[0].data
    assert a is not None and b is not None
    assert torch.equal(a, b)


def test_a_second_reinject_does_not_repeat_the_first() -> None:
    noise = mf.PerItem()
    first = noise([5], (1, 3, 8, 8), scope="Reinject/0", draw=0)
    assert not torch.equal(first, noise([5], (1, 3, 8, 8), scope="Reinject/1", draw=0))
    assert torch.equal(first, noise([5], (1, 3, 8, 8), scope="Reinject/0", draw=0))


def test_stream_draws_what_one_torch_generator_draws() -> None:
    generator = torch.Generator().manual_seed(8)
    first, second = torch.randn(1, 3, 4, 4, generator=generator), torch.randn(1, 3, 4, 4, generator=generator)
    assert torch.equal(mf.Stream(1)([7], (1, 3, 4, 4), scope="", draw=0), first)
    assert torch.equal(mf.Stream(1, skip=1)([7], (1, 3, 4, 4), scope="", draw=0), second)


def test_marginal_variance_after_reinject() -> None:
    """Data of variance v at level s: (1 - s)^2 v + s^2."""
    sigma, v = 0.37, 0.25
    z = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * v**0.5
    state = mf.State[mf.Spec](mf.Latents(1, 256, 256, TOY.info.space), z)
    x = mf.run(mf.Reinject(sigma), TOY, start=state).data
    assert float(x.var()) == pytest.approx((1 - sigma) ** 2 * v + sigma**2, rel=0.02)


@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_refine_on_a_point_mass_gives_the_point(sigma: float, steps: int) -> None:
    """Where all data is one point, any start level leads back to it, in any number of steps."""
    model = mf.toy(std=1e-4)
    colour = torch.tensor([0.3, -0.5, 0.8])
    z = colour.view(1, 3, 1, 1).expand(1, 3, 8, 8).contiguous()
    cond = mf.Condition({"colours": colour.expand(1, 2, 3)})
    state = mf.State[mf.Spec](mf.Latents(1, 8, 8, model.info.space), z)
    chain = mf.Reinject(sigma) >> mf.Refine(mf.DirectSigma(steps))
    assert torch.allclose(mf.run(chain, model, start=state, condition=cond).data, z, atol=1e-3)


def test_events_tell_every_stage_and_step() -> None:
    seen: list[mf.Event] = []
    mf.run(CHAIN, TOY, "a", on_event=seen.append)
    assert [type(e).__name__ for e in seen[:6]] == ["StageBegan"] + 4 * ["Stepped"] + ["StageEnded"]
    steps = [e.step for e in seen if isinstance(e, mf.Stepped)]
    assert [s.to for s in steps[:4]] == list(mf.Shifted(4)(1.0, 64, TOY.info)[1:])
    assert all(s.denoised.shape == s.x.shape for s in steps)


@pytest.mark.parametrize("kind", [mf.StageBegan, mf.Stepped, mf.StageEnded])
def test_what_a_listener_raises_comes_out_as_it_is(kind: type[mf.Event]) -> None:
    """A cancel button raises: the stage has no part in it, neither in the class nor in the text."""

    class CancelledError(Exception):
        pass

    error = CancelledError("enough")

    def cancel(event: mf.Event) -> None:
        if isinstance(event, kind):
            raise error

    with pytest.raises(CancelledError) as raised:
        mf.run(CHAIN, TOY, "a", on_event=cancel)
    assert raised.value is error and str(error) == "enough"


def test_a_chain_may_start_from_a_picture() -> None:
    photo = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    chain = mf.Upscale(mf.Interpolate(2)) >> mf.Encode() >> mf.Reinject(0.1) >> mf.Refine() >> mf.Decode()
    result = mf.run(chain, TOY, "a", seed=[0, 1], start=photo)
    assert result.pixels.shape == (2, 3, 64, 64)
    for bad, text in (
        (photo[0], "start must be pixels of shape"),
        (photo * 2, "start must be pixels in [0, 1]"),
        (photo * float("nan"), "NaN"),
    ):
        with pytest.raises(mf.PlanError, match=text.replace("[", r"\[")):
            mf.run(chain, TOY, "a", start=bad)


def test_inputs_of_odd_kinds_give_the_same() -> None:
    photo = torch.rand(1, 3, 32, 32)
    chain = mf.Encode() >> mf.Decode()
    plain = mf.run(chain, TOY, start=photo).pixels
    turned = photo.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.inference_mode():
        inference = photo.clone()
    for other in (turned, photo.double(), photo.clone().requires_grad_(), inference):
        assert torch.equal(mf.run(chain, TOY, start=other).pixels, plain)


def test_a_chain_that_ends_in_latents_has_no_pixels() -> None:
    with pytest.raises(mf.PlanError, match=r"put Decode\(\) at its end"):
        _ = mf.run(mf.Sample(32, 32), TOY).pixels


def test_nan_in_a_condition_is_refused_before_sampling() -> None:
    bad = mf.Condition({"colours": torch.full((1, 2, 3), float("nan"))})
    with pytest.raises(mf.PlanError, match="prompt's condition holds NaN or infinity in 'colours'"):
        mf.run(CHAIN, TOY, "a", condition=bad)


def test_conditions_must_agree_in_batch() -> None:
    with pytest.raises(mf.PlanError, match="must agree in batch"):
        mf.Condition({"a": torch.zeros(2, 3), "b": torch.zeros(1, 3)})
    with pytest.raises(mf.PlanError, match="2 prompts cannot serve a batch of 3"):
        mf.run(CHAIN, TOY, ["a", "b", "c"], condition=TOY.condition(["a", "b"]))


def test_nan_at_step_k_names_stage_and_step() -> None:
    class Breaks(Toy):
        def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> mf.Velocity:
            inner = super().field(cond)
            return lambda x, sigma: inner(x, sigma) * (float("nan") if sigma < 0.6 else 1.0)

    with pytest.raises(mf.NonFiniteError, match=r"stage 1 of 7, Sample\(...\): NaN after step 3 of 4 \(sigma 0.5 -> "):
        mf.run(CHAIN, Breaks(), "a")


def test_inner_chains_run_through_the_context() -> None:
    inner = mf.Encode() >> mf.Reinject(0.2) >> mf.Refine() >> mf.Decode()

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Twice(mf.Stage[mf.Pixels, mf.Pixels]):
        def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
            return spec

        def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> torch.Tensor:
            return 0.5 * (ctx.through(inner, state).data + state.data)

        def work(self, spec: mf.Pixels, out: mf.Pixels, model: mf.ModelInfo) -> mf.Work:
            return mf.Work(nfe=1)

    mf.testing.check_stage(Twice())


def test_cache_pays_the_low_stage_once(tmp_path: Path) -> None:
    cache = mf.StageCache(tmp_path)
    model = Counting()
    first = mf.run(CHAIN, model, ["a", "b"], seed=[1, 2], cache=cache)
    again = mf.run(mf.recipes.paper(low=(32, 32), size=(64, 64), steps=4, sigma=0.3), model, "b", seed=2, cache=cache)
    assert [s.cached for s in again.stages] == [True] * 4 + [False] * 3
    assert again.nfe == 1
    fresh = mf.StageCache(tmp_path)
    replayed = mf.run(CHAIN, model, "a", seed=1, cache=fresh)
    assert replayed.nfe == 0
    assert torch.equal(replayed.pixels[0], first.pixels[0])
    assert mf.run(CHAIN, model, "a", cache=fresh, seed=3).nfe == 5
    assert mf.run(CHAIN, model, "a", cache=fresh, seed=1, negative="x").nfe == 0  # nothing reads it
    guided = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=4, guidance=mf.CFG(2.0))
    made = [mf.run(guided, model, "a", cache=fresh, seed=1, negative=n).nfe for n in ("x", "x", "y")]
    assert made[0] == made[2] > 0 == made[1]


def test_a_broken_cache_file_is_made_again(tmp_path: Path) -> None:
    whole = mf.run(CHAIN, TOY, "a", cache=mf.StageCache(tmp_path)).pixels
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    again = mf.run(CHAIN, TOY, "a", cache=mf.StageCache(tmp_path))
    assert not any(s.cached for s in again.stages)
    assert torch.equal(again.pixels, whole)


def test_the_cache_forgets_the_oldest() -> None:
    cache = mf.StageCache(max_bytes=3 * 64 * 64 * 4)
    mf.run(CHAIN, TOY, "a", cache=cache)
    assert sum(s.cached for s in mf.run(CHAIN, TOY, "a", cache=cache).stages) == 7
    mf.run(CHAIN, TOY, "b", cache=cache)
    assert not any(s.cached for s in mf.run(CHAIN, TOY, "a", cache=cache).stages)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_nested_noise_is_standard_normal_and_the_block_mean_of_the_larger(factor: int) -> None:
    """Mean 0, variance 1, neighbours independent; and its relation to what native sampling of that seed draws."""
    shape, seeds = (2, 8, 40, 40), (5, 6)
    small = mf.Nested(factor)(seeds, shape, scope="Sample", draw=0)
    assert small.shape == shape and abs(float(small.mean())) < 0.03 and abs(float(small.var()) - 1) < 0.03
    for a, b in ((small[..., 1:], small[..., :-1]), (small[..., 1:, :], small[..., :-1, :])):
        assert abs(float((a * b).mean())) < 0.03
    large = mf.PerItem()(seeds, (2, 8, 40 * factor, 40 * factor), scope="Sample", draw=0)
    blocks = large.view(2, 8, 40, factor, 40, factor).mean((3, 5)) * factor
    assert torch.allclose(small, blocks, atol=1e-5)
    alone = mf.Nested(factor)(seeds[1:], (1, *shape[1:]), scope="Sample", draw=0)
    assert torch.equal(alone, small[1:])


@pytest.mark.parametrize("bad", [0, 1.5, True, 17])
def test_nested_noise_of_a_factor_that_makes_no_sense(bad: object) -> None:
    with pytest.raises(mf.PlanError, match="factor must be a whole number from 1 to 16"):
        mf.Nested(bad)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Wild(mf.Stage[mf.Pixels, mf.Pixels]):
    """A stage of a user's that does what `kind` says."""

    kind: str

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        if self.kind == "plan":
            raise MemoryError("in the plan")
        return spec

    def check(self, model: mf.Backbone) -> None:
        if self.kind == "check":
            raise KeyError("in the check")

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> torch.Tensor:
        class OwnError(mf.PlanError):
            def __init__(self, a: int, b: int) -> None:
                super().__init__(f"{a} and {b}")

        class WordlessError(Exception):
            def __str__(self) -> str:
                raise ValueError

        raised: dict[str, BaseException] = {
            "memory": MemoryError(),
            "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "key": KeyError("gone"),
            "own": OwnError(1, 2),
            "deep": RecursionError("too deep"),
            "wordless": WordlessError(),
            "exit": SystemExit(0),
            "long": ValueError("x" * 10**6),
        }
        if self.kind in raised:
            raise raised[self.kind]
        if self.kind == "sparse":
            return state.data.to_sparse()
        if self.kind == "flip":  # the same numbers, and the same sum
            return state.data.copy_(state.data.flip(-1)).clone()
        return state.data.mul_(0.5)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("memory", mf.ResourceError, "out of memory; try a smaller size or batch"),
        ("cuda", mf.ResourceError, "out of memory; try a smaller size or batch .CUDA out of memory"),
        ("key", mf.PromiseError, "failed with KeyError: 'gone'"),
        ("deep", mf.PromiseError, "failed with RecursionError: too deep"),
        ("wordless", mf.PromiseError, "failed with WordlessError: "),
        ("exit", mf.PromiseError, "failed with SystemExit: 0"),
        ("long", mf.PromiseError, r"failed with ValueError: x{2000}\.\.\.$"),
        ("sparse", mf.PromiseError, r"apply made a tensor of layout torch\.sparse_coo; give an ordinary one"),
        ("own", mf.PlanError, "1 and 2"),
        ("plan", mf.PlanError, "its plan failed with MemoryError: in the plan"),
        ("check", mf.PromiseError, "failed with KeyError: 'in the check'"),
        ("half", mf.PromiseError, "changed the tensor it was given; work on a copy"),
        ("flip", mf.PromiseError, "changed the tensor it was given; work on a copy"),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_whatever_a_stage_does_is_an_error_with_its_name_and_number(
    kind: str, error: type[mf.MrflowError], words: str, keep: bool
) -> None:
    chain = mf.recipes.native(size=(32, 32), steps=1) >> Wild(kind)
    with pytest.raises(
        error, match=rf"^stage 3 of 3, Wild\(\.\.\.\):? {words}|^stage 3 of 3, Wild\(\.\.\.\): apply {words}"
    ):
        mf.run(chain, mf.toy(), "a", keep=keep)


@dataclass(frozen=True)
class Ends(mf.Stage[mf.Pixels, mf.Pixels]):
    """Gives a parameter, or is ended by a signal."""

    code: int = 0

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> torch.Tensor:
        if self.code:
            raise SystemExit(self.code)
        return torch.nn.Parameter(state.data.clone())


def test_what_is_given_needs_no_gradients_and_signals_go_through() -> None:
    chain = mf.recipes.native(size=(32, 32), steps=1)
    made = mf.run(chain >> Ends(), mf.toy(), "a").pixels
    assert type(made) is torch.Tensor and not made.requires_grad
    with pytest.raises(SystemExit):
        mf.run(chain >> Ends(143), mf.toy(), "a")


@dataclass(frozen=True)
class Fixed(mf.Schedule):
    """A schedule that begins where it likes."""

    levels: tuple[float, ...]

    def __call__(self, start: float, tokens: int, model: mf.ModelInfo) -> tuple[float, ...]:
        return self.levels


def test_a_schedule_must_begin_where_the_stage_begins() -> None:
    info = mf.toy().info
    with pytest.raises(mf.PlanError, match=r"stage 1 of 1.*begins at sigma 0\.8, but .* noise of level 1;"):
        mf.plan(mf.Sample(32, 32, Fixed((0.8, 0.4, 0.0))), info)
    refine = mf.Sample(32, 32) >> mf.Reinject(0.3) >> mf.Refine(Fixed((0.5, 0.2, 0.0)))
    with pytest.raises(mf.PlanError, match=r"stage 3 of 3.*begins at sigma 0\.5, but .* noise of level 0\.3;"):
        mf.plan(refine, info)
    mf.plan(mf.Sample(32, 32) >> mf.Reinject(0.3) >> mf.Refine(Fixed((0.3, 0.2, 0.0))), info)


@dataclass(frozen=True)
class Boaster(mf.Upscaler):
    """An upscaler that says 2 and makes 3."""

    @property
    def scale(self) -> int:
        return 2

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.repeat_interleave(3, -1).repeat_interleave(3, -2)


@pytest.mark.parametrize("size", [None, (16, 16), (12, 12)])
def test_an_upscaler_must_make_the_scale_it_says(size: tuple[int, int] | None) -> None:
    from mrflow.testing import check_stage

    start = torch.rand(1, 3, 8, 8)
    with pytest.raises(
        mf.PromiseError, match=r"Boaster says scale 2, so it must make \(1, 3, 16, 16\) .* \(1, 3, 24, 24\)"
    ):
        mf.run(mf.Upscale(Boaster(), size), mf.toy(), "", start=start)
    with pytest.raises(mf.PromiseError, match="Boaster says scale 2"):
        check_stage(mf.Upscale(Boaster()))


def test_a_solver_is_told_that_there_is_no_field_at_zero() -> None:
    class Ends(mf.Solver):
        evals = 2

        def step(
            self, v: mf.Velocity, x: torch.Tensor, sigma: float, to: float, past: History
        ) -> tuple[torch.Tensor, History]:
            return x + (to - sigma) * (v(x, sigma) + v(x, to)) / 2, ()

    with pytest.raises(
        mf.PlanError, match="asks for the field at sigma 0; no solver may .*: in a step to 0 .* as Heun"
    ):
        mf.plan(mf.Sample(32, 32, mf.Linear(2), solver=Ends()), mf.toy().info)


def test_a_negative_prompt_that_nothing_reads_is_said_and_not_recorded() -> None:
    model = mf.load("pocket", device="cpu")
    chain = mf.Sample(48, 48, mf.Shifted(2), guidance=mf.CFG(1.0)) >> mf.Decode()
    plain = mf.run(chain, model, "a red circle")
    unread = mf.run(chain, model, "a red circle", negative="a blue square")
    assert torch.equal(plain.pixels, unread.pixels)
    assert any("no stage reads the negative prompt 'a blue square'" in note for note in unread.notes)
    assert (unread.negative, plain.negative) == (model.info.negative, model.info.negative)
    assert plain.notes == ("pocket was trained on squares of 64, 128, 256 pixels; it draws worse at 48x48",)
    read = mf.run(mf.Sample(48, 48, mf.Shifted(2), guidance=mf.CFG(3.0)) >> mf.Decode(), model, "a red circle",
                  negative="a blue square")  # fmt: skip
    assert read.negative == "a blue square"
    assert not any("no stage reads" in note for note in read.notes)


def test_a_picture_is_planned_once_and_the_plan_carries_the_noise_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for kind in (mf.Shifted, mf.DirectSigma):

        def counted(self: Any, *args: Any, real: Any = kind.__call__) -> Any:
            asked.append(type(self))
            return real(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)
    real = runner.plan
    monkeypatch.setattr(runner, "plan", lambda *args, **more: (asked.append("plan"), real(*args, **more))[1])
    chain = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=3)
    rows = mf.run(chain, mf.toy(), "a", seed=1).plan.rows
    assert asked == ["plan", mf.Shifted, mf.DirectSigma]
    assert [(row.name, len(row.sigmas), len(row.evaluations)) for row in rows if row.sigmas] == [
        ("Sample", 4, 3),
        ("Refine", 2, 1),
    ]
    assert rows[0].sigmas == (*rows[0].evaluations, 0.0)


def test_a_plan_is_taken_where_it_fits_and_refused_elsewhere() -> None:
    model, chain = mf.toy(), mf.Sample(16, 16, mf.Shifted(2)) >> mf.Decode()
    planned = mf.plan(chain, model, batch=2)
    assert torch.equal(mf.run(chain, model, seed=[1, 2], planned=planned).data, mf.run(chain, model, seed=[1, 2]).data)
    other = mf.Sample(16, 16, mf.Shifted(3)) >> mf.Decode()
    for wrong in (other, chain):
        with pytest.raises(mf.PlanError, match="planned= is of another chain, model or batch"):
            mf.run(wrong, model, seed=[1] if wrong is chain else [1, 2], planned=planned)
    with pytest.raises(mf.PlanError, match="another chain, model"):
        mf.run(chain, model, seed=[1, 2], planned=replace(planned, model=replace(planned.model, cfg=2.0)))


def test_plain_meanings_are_taken_and_others_refused_before_work() -> None:
    chain = mf.recipes.paper(low=32, size=64, steps=1)
    assert chain == mf.recipes.paper(low=(32, 32), size=(64, 64), steps=1)
    assert mf.recipes.ladder([32, 64], steps=1) == mf.recipes.ladder([(32, 32), (64, 64)], steps=1)  # type: ignore[list-item]
    assert mf.plan(chain, TOY) == mf.plan(chain, TOY.info)
    for size in ("64x64", (64,), 0, True, (64.0, 64.0), None):
        with pytest.raises(mf.PlanError, match=r"low must be \(height, width\) in pixels, or one number for a square"):
            mf.recipes.paper(low=size)  # type: ignore[arg-type]
    with pytest.raises(mf.PlanError, match=r"run wants a loaded model, such as mf\.load\('pocket'\)"):
        mf.run(chain, "pocket")  # type: ignore[arg-type]
    with pytest.raises(mf.PlanError, match="facts of a model are wanted"):
        mf.plan(chain, "pocket")  # type: ignore[arg-type]
    for call in (mf.run, mf.plan):
        with pytest.raises(mf.PlanError, match="join stages with >>"):
            call([mf.Decode()], TOY)  # type: ignore[operator]
    one = mf.Sweep({"a": chain}, "one prompt as text", seeds=3)  # type: ignore[arg-type]
    assert [p.text for p in one.prompts] == ["one prompt as text"] and one.seeds == (3,)
    for metrics in (["score"], "score", [mf.sweep.SceneScore]):
        with pytest.raises(mf.PlanError, match="metrics are objects such as"):
            mf.Sweep({"a": chain}, ["a"], metrics=metrics)  # type: ignore[arg-type]
    with pytest.raises(mf.PlanError, match="chains must have labels"):
        mf.Sweep([chain], ["a"])  # type: ignore[arg-type]

"""benchmarks/scale.py at tiny size, and replays of schedules against closed forms and by-hand schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("tqdm")
import scale
import scale_page
from replay import UNIT, Costs, Link, Op, alone, end_to_end, local, most_kept, run, seconds_per_batch
from stage_costs import stage_costs
from ways import Setting

from locallearn import LocalWrapper, MLPDecoder, Plan


def speedup(plan: Plan, ranks: list[int], costs: list[Costs], link: Link, *, eager: bool = False) -> float:
    return alone(plan, costs) / seconds_per_batch(run(local(plan, ranks, costs, 24, eager=eager), link))


@pytest.mark.parametrize("parts", [4, 8, 32])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gpipe_and_1f1b_have_the_bubble_of_the_textbook(ranks: int, parts: int) -> None:
    costs = [UNIT._replace(decoder=0)] * ranks
    for schedule in ("GPipe", "1F1B"):
        seconds = seconds_per_batch(run(end_to_end([1] * ranks, costs, 6, parts, schedule)))
        assert ranks * 3 / seconds == pytest.approx(ranks * parts / (parts + ranks - 1))


def test_one_stage_on_each_of_two_ranks_by_hand() -> None:
    """Forward, forward, decoder, the gradient that goes down, and the lower weights, while the upper ones get theirs."""
    plan, costs = Plan.windows(2, 1), [UNIT] * 2
    assert alone(plan, costs) == pytest.approx(1 + 1 + 0.5 + 2 + 2)
    assert seconds_per_batch(run(local(plan, [1, 1], costs, 24))) == pytest.approx(1 + 1 + 0.5 + 1 + 2)
    late = Link(latency=0.25)
    assert seconds_per_batch(run(local(plan, [1, 1], costs, 24), late)) == pytest.approx(5.5 + 2 * 0.25)
    eager = seconds_per_batch(run(local(plan, [1, 1], costs, 24, eager=True)))
    assert eager == pytest.approx(1 + 0.5 + 2)  # what the upper rank has to do; the lower one waits for nobody


def test_no_replay_beats_the_work_of_the_busiest_rank_and_local_units_without_overlap_reach_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for overlap in (0, 1, 2):
        plan = Plan.windows(6, overlap)
        costs = [Costs(*torch.rand(4, generator=generator).tolist()) for _ in range(6)]
        programs = local(plan, [2, 2, 2], costs, 24)
        busiest = max(sum(op.seconds for op in program) / 24 for program in programs)
        seconds = seconds_per_batch(run(programs, Link(0.1)))
        assert seconds >= busiest - 1e-9
        assert overlap or seconds == pytest.approx(busiest)


def test_zb_h1_has_the_bubble_of_its_paper_and_keeps_no_more_than_1f1b_on_its_first_rank() -> None:
    costs, ranks = [UNIT._replace(decoder=0)] * 8, 8
    for parts in (4, 8, 32):
        zero, one = (run(end_to_end([1] * 8, costs, 6, parts, name)) for name in ("ZB-H1", "1F1B"))
        forward = pull = push = 1 / parts
        bubble = (ranks - 1) * (forward + pull - push)  # Table 2 of Qi et al., 2024
        if parts < ranks:  # too few weights' gradients to fill it: up to the last rank, all of its work, and down again
            path = (ranks - 1) * (forward + pull) + parts * (forward + pull) + push
            assert seconds_per_batch(zero) == pytest.approx(path)
        else:
            assert seconds_per_batch(zero) == pytest.approx(3 + bubble)
        assert seconds_per_batch(zero) < seconds_per_batch(one)
        assert most_kept(zero) == pytest.approx(most_kept(one)) == pytest.approx(min(ranks, parts) / parts)


def test_what_ranks_keep_in_each_schedule() -> None:
    costs = [UNIT] * 8
    assert most_kept(run(end_to_end([2] * 4, costs, 6, 8, "GPipe"))) == 2
    assert most_kept(run(end_to_end([2] * 4, costs, 6, 8, "1F1B"))) == pytest.approx(2 * 4 / 8)
    assert most_kept(run(local(Plan.greedy(8), [2] * 4, costs, 6))) == 1
    assert most_kept(run(local(Plan.windows(8, 1), [2] * 4, costs, 6))) == 2
    assert most_kept(run(local(Plan.windows(4, 1), [1] * 4, [UNIT] * 4, 6, eager=True))) == 2  # of two batches


def test_ranks_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(ValueError, match="ranks wait for each other"):
        run([[Op("forward", 0, 1.0, needs=("b",), gives=[("a", 1.0)])], [Op("forward", 0, 1.0, needs=("a",))]])


def test_costs_of_stages_are_those_of_the_larger_and_the_smaller_one() -> None:
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(nn.Conv2d(4, 4, 7, padding=3) for _ in range(8))))
    model = LocalWrapper(net, [0, 1], 0, MLPDecoder, example=torch.rand(2, 3, 32, 32))
    small, large = stage_costs(model, torch.rand(8, 3, 32, 32), repeats=2)
    assert 0 < small.forward < large.forward
    assert 0 < small.push < large.push
    with pytest.raises(ValueError, match="wrap with overlap=0"):
        stage_costs(
            LocalWrapper(net, [0, 1], 1, MLPDecoder, example=torch.rand(2, 3, 32, 32)), torch.rand(2, 3, 32, 32)
        )


def test_the_page_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(scale_page, "RANKS", (2, 4))
    chain = scale.collect(Setting(rows=32, width=4, pixels=4), steps=2, rounds=1)
    record = {"command": "this test", "machine": "a machine", "chains": [chain]}
    rows = chain["rows"]
    assert sum("pipeline [2, 2]" in name for name in rows) == 3
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows.values())
    loco, gim = (rows[f"{name}, pipeline [2, 2]"]["sent"] for name in ("LoCo, exact", "Greedy InfoMax"))
    outlet = 32 * 4 * 4 * 4 * 4
    assert outlet <= gim[0] < outlet + 200
    assert gim[1] == 0
    assert outlet <= loco[1] < outlet + 200
    text = scale_page.text(record)
    assert all(f"| {name} |" in text for name in rows)
    assert "| 2 | 2.00 | 1.18 | 1.94 | 1.97 | 1.86 | 1.94 | 1.94 | 1.98 |" in text
    scale_page.pictures(record, tmp_path)
    assert (tmp_path / "scale_timeline.png").read_bytes()[:4] == b"\x89PNG"

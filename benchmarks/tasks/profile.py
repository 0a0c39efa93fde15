"""Where the time of a search goes: its operators under torch.profiler, by the time they take themselves."""

from typing import Any

from torch import profiler

from .. import device
from ..context import Context
from ..measure import timed

_ENGINES = ("ours", "ours-csr", "ours-matrix")
_SEARCH = "search"  # the whole
_OPERATORS = 12  # the rest is summed up as "other"


def profile(ctx: Context) -> None:
    for name, engine in ctx.build_paired(*_ENGINES).items():
        for nq in (nq for nq in ctx.case.profile_nqs if nq <= len(ctx.data.queries)):
            ctx.note(f"{name}, nq {nq:,}")
            x = engine.convert(ctx.data.queries[:nq])
            engine.search(x, ctx.case.k)
            alone, _ = timed(engine.search, x, ctx.case.k)
            for _ in range(2):  # the first profile of a process also initialises the profiler
                with profiler.profile(activities=_activities()) as recorded, profiler.record_function(_SEARCH):
                    engine.search(x, ctx.case.k)
                    device.finish()
            phases = {**operators(recorded.key_averages()), "search, unprofiled": alone}
            for phase, seconds in phases.items():
                ctx.row(name, nq=nq, k=ctx.case.k, nprobe=ctx.case.nprobe, phase=phase, seconds=seconds)


def _activities() -> list[profiler.ProfilerActivity]:
    others = profiler.supported_activities() - {profiler.ProfilerActivity.CPU} if device.name != "cpu" else ()
    return [profiler.ProfilerActivity.CPU, *others]


def operators(events: Any) -> dict[str, float]:
    """Seconds of the operators that take most, of all others with the Python code between them, and of the search.

    On an accelerator those of its kernels, and "other" is the time in which none of these ran.
    """
    time = "self_cpu_time_total" if device.name == "cpu" else "self_device_time_total"
    whole = next(event.cpu_time_total for event in events if event.key == _SEARCH) / 1e6
    times = {event.key.removeprefix("aten::"): getattr(event, time) / 1e6 for event in events}
    del times[_SEARCH]
    most = dict(sorted(times.items(), key=lambda item: -item[1])[:_OPERATORS])
    return {**most, "other": whole - sum(most.values()), _SEARCH: whole}

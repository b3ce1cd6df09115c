"""A memory plan as a table and in words."""

from fastrl.memory.plan import MemoryPlan, gib

COLUMNS = ("resident", "bytes", "needed in", "elsewhere")


def resident_rows(plan: MemoryPlan) -> list[tuple[str, str, str, str]]:
    """The largest bytes of each resident, the phases that need it, and where it is otherwise."""
    return [(r.name, gib(r.num_bytes), ", ".join(r.phases),
             "gone" if not r.is_kept else "on the host" if r.is_parked else "stays")
            for r in plan.residents]


def phase_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    """Phase, its bytes, and what they are, largest first."""
    return [(phase, gib(plan.total(phase)),
             ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in
                       sorted(present.items(), key=lambda item: -item[1]) if num_bytes))
            for phase, present in plan.phases.items()]


def headline(plan: MemoryPlan) -> str:
    """One line: does it fit, and with which sizes."""
    reserve = f" beside a reserve of {gib(plan.reserve_bytes)}" if plan.reserve_bytes else ""
    verdict = "fits" if plan.fits else "does not fit"
    sizes = f"microbatches of {plan.max_tokens_per_microbatch} tokens"
    if plan.num_pages:
        sizes += f", {plan.num_pages} pages of {plan.page_size} tokens"
    if plan.parks:
        sizes += (f", {', '.join(sorted(plan.parks))} on the host in turns "
                  f"({gib(plan.parked_bytes)})")
    return (f"memory plan {verdict}: {gib(plan.peak_bytes)} in {plan.peak_phase}{reserve}, of "
            f"{gib(plan.budget_bytes)}; {sizes}")


def describe(plan: MemoryPlan) -> str:
    """The headline and what to change, one line each."""
    return "\n".join([headline(plan), *plan.advice])

"""Records of a fake engine."""

from typing import Any

from engine.shared.records import StepInfo, StepRow


def example_step(step_id: int = 7, tenants: tuple[str, ...] = ("",), **others: Any) -> StepInfo:
    """Return a step with a row of each tenant, whose requests are called `of-` and its name."""
    rows = [
        StepRow(
            id=f"of-{tenant}",
            prompt=0,
            index=1,
            tenant=tenant,
            position=40 + number,
            num_tokens=3,
            is_prompt=False,
            num_generated=2,
            num_drafts=2,
            num_accepted=1,
        )
        for number, tenant in enumerate(tenants)
    ]
    fields: dict[str, Any] = {"started": 1.0, "seconds": {"forward": 0.5}, "num_running": 2, "num_waiting": 1}
    return StepInfo(step_id, rows=rows, **fields | {"num_blocks_used": 3} | others)

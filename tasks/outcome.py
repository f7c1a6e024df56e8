"""What the end of a step means: try again, was done already, or how many shards are lost."""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Completed

from corpora.errors import InputError, PilelineError, Unavailable
from tasks import child

T = TypeVar("T")


def transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry what may be gone next time; a wrong hash or a bad setting fails the same way again."""
    return isinstance(state.result(raise_on_failure=False), Unavailable)


def up_to_date(value: T, message: str) -> T:
    """End a task as "UpToDate": its record on disk says that the work was done before.

    Prefect takes the state from the returned object and hands `value` to the caller, hence the type.
    """
    return cast(T, Completed(name="UpToDate", message=message, data=value))


def every_shard(shards: Sequence[str], *stages: Sequence[PrefectFuture[Any]]) -> list[Any]:
    """Wait for every stage of every shard; return what the last stage gave, in order.

    Each future is resolved: one that nobody asks would leave the flow Completed with a shard lost.  Raises
    one line that counts the failures and quotes the first.
    """
    failures: list[tuple[str, BaseException]] = []
    results = []
    try:
        for shard, *futures in zip(shards, *stages, strict=True):
            for future in futures:
                outcome = _outcome(future)
                if isinstance(outcome, BaseException):
                    failures.append((shard, outcome))
                    break  # the later stages of this shard only say that an earlier one failed
            else:
                results.append(outcome)
    except BaseException:
        child.stop_all()
        raise
    if failures:
        count = f"{len(failures)} of {len(shards)} shards failed"
        told = "; ".join(f"{shard}: {_said(error)}" for shard, error in failures[:3])
        more = "; ..." if len(failures) > 3 else ""
        all_transient = all(isinstance(error, Unavailable) for _, error in failures)
        raise (Unavailable if all_transient else InputError)(f"{count}: {told}{more}")
    return results


def _outcome(future: PrefectFuture[Any]) -> Any:
    future.wait()
    state = future.state
    if state.is_completed():
        return future.result()
    fault = state.result(raise_on_failure=False) if state.is_final() else None
    if isinstance(fault, BaseException):
        return fault
    return InputError(f"ended as {state.name}" + (f" ({state.message})" if state.message else ""))


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, PilelineError) else f"{type(error).__name__}: {error}"

"""Code of a model's own, its chat template, in a thread that ends when nobody waits for it any more."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class _NobodyWaits(BaseException):
    """No Exception, as which a template's own errors are caught."""


async def run_interruptibly(call: Callable[[], _Result]) -> _Result:
    """Return what call() does, computed beside the event loop; when the caller is cancelled, the call is as well.

    It ends between two of its Python instructions. A single one that takes for ever goes on, and keeps no process from
    ending.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()
    lock, is_done = threading.Lock(), False

    def tell(result: Any, error: Exception | None) -> None:
        if future.done():  # the caller has gone
            return
        future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        nonlocal is_done
        result, error = None, None
        with suppress(_NobodyWaits):
            try:
                result = call()
            except Exception as raised:
                error = raised
            with lock:
                is_done = True
            with suppress(RuntimeError):  # the loop has gone, too
                loop.call_soon_threadsafe(tell, result, error)

    thread = threading.Thread(target=run, name="chat template", daemon=True)
    thread.start()
    try:
        return await future
    except asyncio.CancelledError:
        with lock:
            if not is_done and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_NobodyWaits))
        raise

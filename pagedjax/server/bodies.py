"""Bodies whose refusal alone would take long.

Of every field that is not known, and every entry of a wrong type, the validation makes an error of its own; a body of
some megabytes can have a million of them. So objects are bounded here, and `Entries` ends at a list's first error.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

MAX_FIELDS = 2048  # of any object in a body; more than MAX_LIST, so that a field's own bound is the one named
T = TypeVar("T")


class _FirstError:
    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(source) | {"fail_fast": True}


Entries = Annotated[list[T], _FirstError()]


class BoundedRequest(Request):
    """Whose JSON has no object of more than MAX_FIELDS fields."""

    async def json(self) -> Any:
        value = await super().json()
        waiting = [value]
        while waiting:
            inner = waiting.pop()
            if isinstance(inner, dict):
                if len(inner) > MAX_FIELDS:
                    raise HTTPException(400, f"an object has {len(inner)} fields; accepted: at most {MAX_FIELDS}")
                waiting += [v for v in inner.values() if isinstance(v, dict | list)]
            elif isinstance(inner, list):
                waiting += [v for v in inner if isinstance(v, dict | list)]
        return value


class BoundedRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return bounded

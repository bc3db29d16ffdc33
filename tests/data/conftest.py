"""What the tests of data files share."""

from collections.abc import Callable

import pytest


@pytest.fixture
def refused() -> Callable[[type[Exception], Callable[[], object]], str]:
    """A function that returns the message with which a call fails, after checking that it is one line."""

    def message_of(error: type[Exception], call: Callable[[], object]) -> str:
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert message
        assert "\n" not in message
        return message

    return message_of

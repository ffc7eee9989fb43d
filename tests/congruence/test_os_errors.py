"""Client and trainer, which each have their own texts, give the same advice for the same operating system error."""

from __future__ import annotations

import errno
import os

import pytest

from clipweld.client._os_errors import next_step as of_client
from clipweld.trainer.os_errors import next_step as of_trainer

CAUSES = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "EFBIG", "EIO", "EMFILE", "ENOENT", "EPROTO")


@pytest.mark.parametrize("name", CAUSES)
def test_client_and_trainer_give_the_same_advice(name):
    number = getattr(errno, name)
    exc = OSError(number, os.strerror(number))
    assert of_client(exc) == of_trainer(exc)
    assert ("make room" in of_client(exc)) == (name in ("ENOSPC", "EDQUOT"))

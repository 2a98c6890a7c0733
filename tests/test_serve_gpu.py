"""An engine on a GPU: captured ragged steps against each request alone."""

import pytest
from serving import client_of
from talks import make_chatty
from test_serve_engine import MIXED, alone, same

pytestmark = pytest.mark.gpu


def test_captured_steps_give_the_tokens_of_each_request_alone(processor):
    chatty = make_chatty(processor)
    wanted = [alone(chatty, one)[0] for one in MIXED]
    with client_of(*chatty) as client:
        for _ in range(3):
            found = client.ask(*(client.work(q, *shown) for q, shown in MIXED))
            assert [same(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(MIXED)
        step = client.engine._decoding._step
        assert step._records
        assert all(kind[0] <= len(MIXED) for kind in step._records)
        # What a first capture wrote is not in another answer.
        again = client.ask(*(client.work(q, *shown, namespace="b") for q, shown in MIXED))
        assert [same(*pair) for pair in zip(again, wanted, strict=True)] == [True] * len(MIXED)

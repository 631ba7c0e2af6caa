"""The serving experiment's pieces, on a model of two layers; and what the server's own ones promise it."""

import asyncio
import json
import threading
from argparse import Namespace
from typing import Any

import httpx
import pytest

from experiments import serving, stream_client
from experiments.common import small_shape
from pagedjax.bench import Workload
from pagedjax.detokenizer import Detokenizer
from pagedjax.server.async_engine import Arrival, AsyncEngine, Delta, _deliver, joined
from pagedjax.server.guard import Limits
from pagedjax.server.serve import make_server
from pagedjax.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_made_up_tokenizer_has_the_whole_vocabulary_and_words_of_several_letters(tmp_path):
    serving.make_tokenizer(str(tmp_path), 2000)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 2000
    detokenizer = Detokenizer(tokenizer, [300])
    for token in (500, 501, 1999):
        detokenizer.append(token)
    assert detokenizer.text == tokenizer.decode([500, 501, 1999]) and len(detokenizer.text.split()) == 3


def test_small_clients_get_every_token_and_the_engine_is_idle_again(tmp_path):
    args = Namespace(shape=small_shape("llama3.2-1b"), streams=2, clients=2, small=True)
    workload = Workload("small", [(5, 4), (5, 7), (5, 6)])
    llm = serving.make_llm(args, workload, str(tmp_path), warm_up=False)
    clients = serving.Clients(args)
    server, engine = make_server(llm, "shape", Limits())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        made = clients.run(server.port(), serving.prompts_of(workload, 1000, seed=0), workload)
        assert made["output_tokens_per_s"] > 0 and made["tokens_per_event"] >= 1
        head = {"x": "a" * (Limits().max_headers + 1)}
        assert httpx.get(f"http://127.0.0.1:{server.port()}/health", headers=head).status_code in (400, 431)
        assert engine.num_requests == 0
    finally:
        server.should_exit = True
        thread.join()
        clients.close()
    llm.engine.check_integrity()


def test_clients_find_events_that_arrive_in_parts_and_refuse_what_is_cut_off():
    events = [json.dumps({"choices": [{"text": "a"}]}), json.dumps({"choices": []}), "[DONE]"]
    body = b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in (f"data: {event}\n\n".encode() for event in events))
    data = stream_client.START + b"a: b\r\n\r\n" + body + b"0\r\n\r\n"

    async def read(data: bytes) -> list:
        reader = stream_client.Reader(b"")
        for i in range(0, len(data), 7):
            reader.data_received(data[i : i + 7])
        return reader.events()

    assert [event for _, event in asyncio.run(read(data))] == [json.loads(event) for event in events[:2]]
    with pytest.raises(ValueError, match="no whole stream"):
        asyncio.run(read(data[:-9]))


def test_what_comes_last_while_a_stream_is_busy_is_not_lost():
    async def run() -> list[str]:
        engine: Any = AsyncEngine(None, 4)  # pyright: ignore[reportArgumentType]
        texts = []
        running = engine.generate("a", None, None)
        first = asyncio.ensure_future(anext(running))
        await asyncio.sleep(0)
        stream = engine._streams["a"]
        _deliver([Arrival(stream, [Delta(0, "a")], False)])
        texts.append((await first)[1][0].text)
        _deliver([Arrival(stream, [Delta(0, "b")], False)])
        _deliver([Arrival(stream, [Delta(0, "c", finish_reason="length")], True)])
        return texts + [deltas[0].text async for _, deltas in running]

    assert asyncio.run(run()) == ["a", "bc"]


def test_deltas_that_wait_become_one_of_each_sequence():
    first, second = Delta(0, "a", [1]), Delta(1, "b", [2])
    made = joined([first, second], [Delta(1, "c", [3], [], "length")])
    assert [(d.index, d.text, d.token_ids, d.finish_reason) for d in made] == [
        (0, "a", [1], None),
        (1, "bc", [2, 3], "length"),
    ]

"""A tiny nested checkpoint behind a real socket."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from anybit.kernels import native
from nested_case import nest
from tiny_checkpoints import quantize_tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def nested_checkpoint(tmp_path_factory):
    if native.native() is None:
        pytest.skip("anybit._native is not built")
    out = nest(quantize_tiny("llama", tmp_path_factory.mktemp("served"), config={"max_position_embeddings": 512}))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


class Running:
    """A server in this process."""

    def __init__(self, checkpoint, *, key=None, slots=4, max_waiting=256, tokens=2048, hosts=("127.0.0.1",), **limits):
        pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
        from anybit.engine.native import NativeModel
        from anybit.engine.tokenizer import open_tokenizer
        from anybit.serving.app import create_app
        from anybit.serving.batch.engine import BatchEngine
        from anybit.serving.drain import Server
        from anybit.serving.metrics import Metrics
        from anybit.serving.run import listen, settings
        from anybit.serving.service import Service

        self.model = NativeModel.open(checkpoint, verify=False, max_tokens=tokens, max_sequences=slots)
        self.tokenizer = open_tokenizer(checkpoint)
        self.engine = BatchEngine(self.model, ends=frozenset(), max_waiting=max_waiting)
        self.service = Service(
            "tiny", checkpoint, self.engine, self.tokenizer, frozenset(), Metrics(self.engine.stats), 1
        )
        self.app = create_app(self.service, key=key, hosts=hosts)
        if limits:
            self.app.user_middleware[0].kwargs.update(limits)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.port = listener.getsockname()[1]
        self._server = Server(settings(self.app), self.engine)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def idle(self, seconds=10):
        """Wait until the engine has nothing to do."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats()
            if stats.running == stats.waiting == 0:
                return stats
            time.sleep(0.01)
        raise AssertionError(f"still at work: {stats}")

    def end(self):
        """As at SIGTERM."""
        self._server.handle_exit(signal.SIGTERM, None)

    def ended(self, seconds=20):
        """Whether it ends in so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self):
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="session")
def server(nested_checkpoint):
    running = Running(nested_checkpoint)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def start(nested_checkpoint):
    started = []

    def begin(**options):
        started.append(Running(nested_checkpoint, **options))
        return started[-1]

    yield begin
    for running in started:
        running.stop()

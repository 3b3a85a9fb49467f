"""The server with --device cuda, on the bundled model."""

from __future__ import annotations

import pytest

from helpers.server_process import ServerProcess

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "flags", [(), ("--deterministic", "--kv-cache-dtype", "fp8"), ("--disable-cuda-graph",)]
)
def test_answers_over_http(flags):
    with ServerProcess("--device", "cuda", *flags) as server:
        server.wait_ready()
        assert "memory of the GPU: 0.88 of " in server.log
        info = server.http.get("/get_model_info").json()
        assert info["device"] == "cuda" and info["batch_invariant"] == ("--deterministic" in flags)
        client = server.sdk()
        model = client.models.list().data[0].id
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        once, again = (
            client.chat.completions.create(**asked, temperature=0, max_tokens=32) for _ in range(2)
        )
        assert "Paris" in once.choices[0].message.content
        assert once.choices[0].message.content == again.choices[0].message.content
        many = client.completions.create(
            model=model, prompt="Once", n=16, max_tokens=64, temperature=1.0, seed=1
        )
        assert len({choice.text for choice in many.choices}) > 8

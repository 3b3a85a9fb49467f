"""Adapters made by peft, served by a real engine over HTTP, with few places for many of them."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import pytest
import torch

from engine import LLM, AsyncEngine, SamplingParams
from engine.errors import InvalidRequest
from helpers.adapters import LINEAR, MODULES, make_adapter, save_adapter
from helpers.crowd import held_bytes
from helpers.http_server import DEADLINE_S, wait_until, write_model
from helpers.server_process import ServerProcess, run
from helpers.tiny_models import make_model, save_model

NUM_ADAPTERS = 100
NUM_PLACES = 8
PROMPT = "The quick brown fox jumps over the lazy dog, and then it comes back."
MAX_TOKENS = 12
RACE_S = 3.0
NOISE_BYTES = 8 << 20
"""What processes that do the same again and again may grow by, or else shrink."""

T = TypeVar("T")


class Files(NamedTuple):
    """A model with a hundred adapters in one directory, named a0 to a99, and what each answers.

    The adapters are large for their model, so that it shows in a process whether it holds some or all.
    """

    model: Path
    adapters: Path
    answers: dict[str | None, str]
    vectors: dict[str | None, list[float]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("lora")
    base = write_model(directory / "model")
    model = make_model("llama", vocab_size=257, num_hidden_layers=2)
    save_model(model, base)
    adapters = directory / "adapters"
    for number in range(NUM_ADAPTERS):
        targets = (LINEAR, MODULES, ("q_proj", "v_proj", "up_proj"))[number % 3]
        wrapped = make_adapter(model, targets, rank=60 + number % 5, seed=number)
        save_adapter(wrapped, adapters / f"a{number}")
        model = wrapped.unload()
    names = [None, *(f"a{number}" for number in range(NUM_ADAPTERS))]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(str(base), num_threads=2, pooling="mean") as llm:
        paths = [name and str(adapters / name) for name in names]
        outputs = llm.generate([PROMPT] * len(names), params, lora_path=paths, use_tqdm=False)
        vectors = llm.embed([PROMPT] * len(names), lora_path=paths).tolist()
    texts = [output.outputs[0].text for output in outputs]
    return Files(base, adapters, dict(zip(names, texts, strict=True)), dict(zip(names, vectors, strict=True)))


def flags(files: Files, *more: str) -> tuple[str, ...]:
    return (
        "--model-path", str(files.model), "--served-model-name", "base", "--num-threads", "2",
        "--lora-dir", str(files.adapters),
        "--max-loras-per-batch", str(NUM_PLACES), "--max-loaded-loras", str(NUM_PLACES),
        "--enable-cache-report", "--pooling", "mean", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(files: Files):
    named = (f"first={files.adapters}/a0", str(files.adapters / "a1"))
    with ServerProcess(*flags(files, "--lora-paths", named[0], "--lora-paths", named[1])) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def ask(server: ServerProcess, **fields: Any) -> httpx.Response:
    body = {
        "model": "base", "prompt": PROMPT, "temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True,
        **fields,
    }  # fmt: skip
    return server.http.post("/v1/completions", json=body)


def embed(server: ServerProcess, **fields: Any) -> list[float]:
    response = server.http.post("/v1/embeddings", json={"model": "base", "input": PROMPT, **fields})
    assert response.status_code == 200, response.text
    return response.json()["data"][0]["embedding"]


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def load_of(server: ServerProcess) -> dict[str, Any]:
    return server.http.get("/v1/loads").json()["aggregate"]


def assert_idle(server: ServerProcess) -> None:
    """Nothing runs, and nothing is held: blocks and places alike."""
    wait_until(lambda: load_of(server)["num_total_reqs"] == 0 and load_of(server)["lora_num_in_use"] == 0)
    assert load_of(server)["num_used_tokens"] == 0
    assert load_of(server)["lora_pool_slots_used"] <= NUM_PLACES


def cut_off(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(2)}, directory / "adapter_model.bin")


def pickled_under_the_name(directory: Path) -> None:
    torch.save({"x": torch.zeros(2)}, directory / "adapter_model.safetensors")


def without_configuration(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def a_pipe(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


def a_device(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.safetensors").symlink_to("/dev/zero")


def weights_from_outside(directory: Path) -> None:
    outside = directory.parents[1] / "outside.safetensors"
    (directory / "adapter_model.safetensors").replace(outside)
    (directory / "adapter_model.safetensors").symlink_to(outside)


DAMAGES = {
    cut_off: "invalid_adapter",
    pickled: "invalid_adapter",
    pickled_under_the_name: "invalid_adapter",
    without_configuration: "adapter_not_found",
    a_pipe: "invalid_value",
    a_device: "invalid_value",
    weights_from_outside: "invalid_value",
}
"""And the codes of their refusals."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_of_a_damaged_adapter_is_loaded(
    server: ServerProcess, files: Files, damage: Callable[[Path], None]
) -> None:
    directory = files.adapters / damage.__name__
    shutil.copytree(files.adapters / "a2", directory)
    damage(directory)
    before = load_of(server)["lora_pool_slots_used"], server.http.get("/v1/models").json()
    code, asked = DAMAGES[damage], {"model": "base", "lora_path": str(directory)}
    status = 404 if code == "adapter_not_found" else 400
    for path, body, expected in (
        ("/v1/completions", {**asked, "prompt": PROMPT}, status),
        ("/v1/embeddings", {**asked, "input": PROMPT}, status),
        ("/load_lora_adapter", {"lora_name": "damaged", "lora_path": str(directory)}, 400),
        ("/v1/load_lora_adapter", {"lora_name": "damaged", "lora_path": damage.__name__}, 400),
    ):
        response = server.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (expected, code), response.text
    assert (load_of(server)["lora_pool_slots_used"], server.http.get("/v1/models").json()) == before


def test_answers_differ(files):
    assert len(set(files.answers.values())) > NUM_ADAPTERS * 0.9
    assert len(set(map(tuple, files.vectors.values()))) == NUM_ADAPTERS + 1


def test_every_way_to_name_one_gives_the_same_tokens_beside_an_unaffected_base(server, files):
    ways = [
        {"model": "base:first"},
        {"model": "first"},
        {"lora_path": "first"},
        {"lora_path": f"{files.adapters}/a0"},
        {"model": f"base:{files.adapters}/a1"},
        {"lora_path": "a2"},
        {},
        {},
    ]
    names = ["a0", "a0", "a0", "a0", "a1", "a2", None, None]
    with ThreadPoolExecutor(2 * len(ways)) as pool:
        vectors = pool.map(lambda fields: embed(server, **fields), ways)
        answers = list(pool.map(lambda fields: text_of(ask(server, **fields)), ways))
    assert answers == [files.answers[name] for name in names]
    assert list(vectors) == [files.vectors[name] for name in names]


def test_cached_prefixes_are_those_of_the_same_adapter(server, files):
    prompt = "Another one. " + PROMPT * 4

    def cached(**fields: Any) -> int:
        usage = ask(server, prompt=prompt, **fields).json()["usage"]
        assert usage["prompt_tokens"] > 200
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(model="first") == 0
    assert 200 < cached(lora_path="a0") < len(prompt)
    assert cached(lora_path="a3") == 0
    assert cached() == 0
    assert cached(model="first", cache_salt="mine") == 0
    assert cached(model="first") > 200


def test_a_name_with_other_weights_never_meets_old_prefixes(server, files):
    """What was cached under it is not found, and is again when the weights come back."""
    prompt = "Yet another one. " + PROMPT * 4
    fields = {"prompt": prompt, "model": "name"}
    cached, texts = [], []
    for path in ("a40", "a41", "a40"):
        body = {"lora_name": "name", "lora_path": path}
        assert server.http.post("/load_lora_adapter", json=body).is_success
        for _ in range(2):
            response = ask(server, **fields)
            texts.append(text_of(response))
            cached.append(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert (cached[0], cached[2]) == (0, 0) and cached[1] == cached[3] == cached[4] == cached[5] > 200
    assert texts[0] == texts[1] == texts[4] == texts[5] != texts[2] == texts[3]
    assert server.http.post("/unload_lora_adapter", json={"lora_name": "name"}).is_success


@contextmanager
def sampled(read: Callable[[], T]) -> Iterator[list[T]]:
    """What `read` tells again and again until the end."""
    samples, is_over = [read()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            samples.append(read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def exchange(server: ServerProcess, files: Files, wanted: list[str | None]) -> int:
    """A text with each adapter and a vector with every fourth, 16 at once, all of which must be right; the
    peak of the memory of all processes."""

    def read() -> tuple[int, int, int]:
        load = load_of(server)
        return held_bytes(server.process.pid), load["lora_pool_slots_used"], load["lora_num_in_use"]

    embedded = wanted[::-4]
    with sampled(read) as samples, ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda name: text_of(ask(server, lora_path=name)), wanted)
        vectors = list(pool.map(lambda name: embed(server, lora_path=name), embedded))
        assert list(answers) == [files.answers[name] for name in wanted]
    assert vectors == [files.vectors[name] for name in embedded]
    peak_bytes, most_loaded, most_in_use = map(max, zip(*samples, strict=True))
    assert most_loaded <= NUM_PLACES and most_in_use <= NUM_PLACES
    assert_idle(server)
    return peak_bytes


def test_a_hundred_adapters_in_eight_places(files):
    """Memory is bounded by the flags; what else grows is at its most before the first adapter comes."""
    chooser = random.Random(1)
    wanted = [chooser.choice([None, *(f"a{n}" for n in range(NUM_ADAPTERS))]) for _ in range(200)]
    sizes = [
        (files.adapters / f"a{n}" / "adapter_model.safetensors").stat().st_size for n in range(NUM_ADAPTERS)
    ]
    # Each place holds at most as much as the largest file, float32 like the base; one more is read, twice.
    allowed_bytes = (NUM_PLACES + 2) * max(sizes) + NOISE_BYTES
    assert sum(sizes[int(name[1:])] for name in {*wanted} - {None}) > 2 * allowed_bytes, "it would not show"
    with ServerProcess(*flags(files, "--max-total-tokens", "4096")) as server:
        server.wait_ready()
        assert ask(server, regex="[a-z]{3}").status_code == 200, "which starts the process that compiles"
        before_bytes = [exchange(server, files, [None] * 200) for _ in range(3)][-1]
        assert load_of(server)["lora_pool_slots_used"] == 0
        grown_bytes = exchange(server, files, wanted) - before_bytes
        assert grown_bytes <= allowed_bytes
        assert load_of(server)["lora_num_evictions"] >= len({*wanted} - {None}) - NUM_PLACES
        assert server.stop() == 0


def race(server: ServerProcess, files: Files, seconds: float) -> None:
    """Names come and go, and mean now one adapter and now another, while all are asked for."""
    begin = time.monotonic()
    meanings = {f"x{i}": (f"a{10 + i}", f"a{20 + i}") for i in range(4)}
    served: list[str] = []

    def goes_on() -> bool:
        """Until enough has been asked for as well: on a busy machine that takes longer."""
        elapsed_s = time.monotonic() - begin
        return elapsed_s < seconds or (len(served) <= 10 and elapsed_s < seconds + DEADLINE_S)

    def change(name: str) -> None:
        chooser = random.Random(name)
        while goes_on():
            body = {"lora_name": name, "lora_path": str(files.adapters / chooser.choice(meanings[name]))}
            route = chooser.choice(("/load_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"))
            assert server.http.post(route, json=body).status_code in (200, 400)

    def use(seed: int) -> None:
        chooser = random.Random(seed)
        while goes_on():
            name = chooser.choice(list(meanings))
            if chooser.random() < 0.2:
                body = {"model": name, "input": PROMPT}
                response = server.http.post("/v1/embeddings", json=body)
                assert response.status_code == 404 or response.json()["data"][0]["embedding"] in [
                    files.vectors[meaning] for meaning in meanings[name]
                ]
                continue
            response = ask(server, model=name)
            if response.status_code == 404:
                assert response.json()["error"]["code"] in ("model_not_found", "adapter_not_found")
                continue
            assert text_of(response) in [files.answers[meaning] for meaning in meanings[name]]
            served.append(name)

    with ThreadPoolExecutor(12) as pool:
        for done in [*(pool.submit(change, n) for n in meanings), *(pool.submit(use, i) for i in range(8))]:
            done.result()
    assert len(served) > 10
    assert_idle(server)
    for name in meanings:
        server.http.post("/unload_lora_adapter", json={"lora_name": name})
    assert not any(card["id"].startswith("x") for card in server.http.get("/v1/models").json()["data"])


def test_loads_and_unloads_race_with_requests(server, files):
    race(server, files, RACE_S)


@pytest.mark.soak
def test_loads_and_unloads_race_with_requests_for_long(server, files):
    race(server, files, 30)


def test_files_that_change_after_they_made_room(server, files, tmp_path):
    """What a name meant is gone: it is told, not answered with something else."""
    own = shutil.copytree(files.adapters / "a50", files.adapters / "own")
    try:
        assert server.http.post(
            "/load_lora_adapter", json={"lora_name": "own", "lora_path": str(own)}
        ).is_success
        assert text_of(ask(server, model="own")) == files.answers["a50"]
        shutil.copytree(files.adapters / "a51", own, dirs_exist_ok=True)
        for number in range(60, 60 + NUM_PLACES):
            text_of(ask(server, lora_path=f"a{number}"))
        response = ask(server, model="own")
        assert response.status_code == 404 and "changed" in response.json()["message"]
        assert text_of(ask(server, lora_path=f"{own}/.")) == files.answers["a51"]
    finally:
        server.http.post("/unload_lora_adapter", json={"lora_name": "own"})
        shutil.rmtree(own)


def test_a_restarted_engine_has_the_adapters(server, files):
    loaded = server.http.post("/load_lora_adapter", json={"lora_name": "late", "lora_path": "a7"})
    assert loaded.is_success
    server.engine.kill()
    wait_until(lambda: server.http.get("/debug/state").json()["server"]["restarts"] == 1)
    wait_until(lambda: server.http.get("/ready").status_code == 200)
    assert text_of(ask(server, model="late")) == files.answers["a7"]
    assert text_of(ask(server, model="first")) == files.answers["a0"]
    assert text_of(ask(server)) == files.answers[None]


@pytest.mark.parametrize("path", ["/nonexistent", "{model}"])
def test_a_start_with_an_adapter_that_is_none(files, path):
    path = path.format(model=files.model)
    done = run("--model-path", str(files.model), "--lora-paths", f"x={path}", "--port", "0")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --lora-paths") and path in last
    assert "Traceback" not in done.stderr


def test_llm_takes_adapters(files):
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(str(files.model), num_threads=1, max_loras_per_batch=2, max_loaded_loras=3) as llm:
        names = ["a0", None, "a4", "a5", "a0", "a6"]
        paths = [name and str(files.adapters / name) for name in names]
        outputs = llm.generate([PROMPT] * 6, params, lora_path=paths, use_tqdm=False)
        assert [output.outputs[0].text for output in outputs] == [files.answers[name] for name in names]
        [one] = llm.generate(PROMPT, params, lora_path=paths[2], use_tqdm=False)
        assert one.outputs[0].text == files.answers["a4"]
        with pytest.raises(InvalidRequest, match="adapter_config.json"):
            llm.generate(PROMPT, params, lora_path=str(files.model), use_tqdm=False)
        with pytest.raises(InvalidRequest, match="2 adapters for 1 prompts"):
            llm.generate(PROMPT, params, lora_path=paths[:2], use_tqdm=False)
        assert not llm._core.has_work and llm._core.stats().num_adapters_in_use == 0


def test_llm_reads_files_again_that_changed(files, tmp_path):
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(str(files.model), num_threads=1) as llm:
        for name in ("a3", "a3", "a4", "a3"):
            own = shutil.copytree(files.adapters / name, tmp_path / "own", dirs_exist_ok=True)
            [output] = llm.generate(PROMPT, params, lora_path=str(own), use_tqdm=False)
            assert output.outputs[0].text == files.answers[name]


def test_async_engine_takes_adapters(files):
    """Many at once, in few places; one that is left early, and ones that are not there."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    names = [None, *(f"a{number}" for number in range(12)), "a3", "a3"]

    async def run() -> None:
        engine = AsyncEngine(
            str(files.model), num_threads=1, pooling="mean", max_loras_per_batch=2, max_loaded_loras=3
        )

        async def answer(name: str | None, **fields: Any) -> str:
            path = name and str(files.adapters / name)
            outputs = [output async for output in engine.generate(PROMPT, params, lora_path=path, **fields)]
            return outputs[-1].outputs[0].text

        async def vector(name: str | None) -> list[float]:
            return (await engine.embed([PROMPT], lora_path=name and str(files.adapters / name)))[0].tolist()

        async with engine:
            answers = asyncio.gather(*map(answer, names))
            vectors = asyncio.gather(*map(vector, names))
            assert await answers == [files.answers[name] for name in names]
            assert await vectors == [files.vectors[name] for name in names]
            async for output in engine.generate(PROMPT, long, lora_path=str(files.adapters / "a5")):
                assert output.outputs[0].finish_reason is None
                break
            messages = [{"role": "user", "content": PROMPT}]
            said = []
            for path in (None, str(files.adapters / "a6")):
                outputs = [output async for output in engine.chat(messages, params, lora_path=path)]
                said.append(outputs[-1].outputs[0].text)
            assert said[0] != said[1]
            for path in ("/nonexistent", str(files.model)):
                with pytest.raises(InvalidRequest, match="adapter_config.json"):
                    async for _ in engine.generate(PROMPT, params, lora_path=path):
                        pass
            assert await answer("a7", n=2) == files.answers["a7"]
            stats = await engine.client.stats()
            assert stats.num_adapters_in_use == 0 and stats.num_adapters_loaded <= 3

    asyncio.run(run())

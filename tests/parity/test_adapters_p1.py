"""Same request, same answer, with adapters: whoever shares the batch, cached, chunked, read again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.adapters.adapter_pool import AdapterPool
from engine.cache.prefix_cache import PrefixCache
from engine.core.engine_core import EngineCore
from engine.core.messages import AdapterLoaded, AdapterRef, Failed, GenerateRequest, LoadAdapter, TokenChunk
from engine.models.registry import read_spec
from engine.runner.model_runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings
from helpers.adapters import LINEAR, MODULES, make_adapter, save_adapter
from helpers.attention import poison
from helpers.guessing import Oracle
from helpers.native import FMA_ISAS
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model

NUM_ADAPTERS = 8
BLOCK_SIZE = 16
CONTEXT_LENGTH = 256
PLENTY_OF_BLOCKS = 300
FEW_BLOCKS = 14
MAX_DRAFTS = 50
TARGETS = (LINEAR, MODULES, ("q_proj", "v_proj"), ("embed_tokens", "down_proj"), ("lm_head", "k_proj"))
RANKS = (8, 1, 16, 33, 4)


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request of the mix; `adapter` is a number, None for the base model."""

    name: str
    prompt: np.ndarray
    params: SamplingParams
    adapter: int | None


def make_mix() -> list[Ask]:
    """Two requests for each of eight adapters and for the base, half of them with a common prefix."""
    generator = np.random.default_rng(3)
    common = generator.integers(3, VOCAB_SIZE, 70).astype(np.int32)
    styles = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "logprobs": 0, "prompt_logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 1},
    ]
    asks = []
    for index in range(2 * NUM_ADAPTERS + 2):
        own = generator.integers(3, VOCAB_SIZE, 1 + 7 * index % 40).astype(np.int32)
        prompt = np.concatenate([common, own]) if index % 2 else own
        params = SamplingParams(
            max_tokens=20 + index, ignore_eos=True, seed=index, **styles[index % len(styles)]
        )
        number = index % (NUM_ADAPTERS + 1)
        asks.append(Ask(f"r{index}", prompt, params, None if number == NUM_ADAPTERS else number))
    return asks


class Machine:
    """A model that serves mixes under different circumstances, each time with nothing cached."""

    def __init__(
        self, directory, adapters, *, dtype="bfloat16", isa="auto", num_threads=2, quantization="none"
    ) -> None:
        self.runner = ModelRunner(
            read_spec(directory),
            directory,
            dtype=dtype,
            num_blocks=PLENTY_OF_BLOCKS,
            block_size=BLOCK_SIZE,
            context_length=CONTEXT_LENGTH,
            max_tokens=512,
            max_rows=32,
            max_draws=32 + MAX_DRAFTS,
            num_threads=num_threads,
            isa=isa,
            max_lora_rank=64,
            quantization=quantization,
        )
        read = self.runner.adapter_reader.load
        self.refs = [AdapterRef(str(path), read(path).digest) for path in adapters]
        self.pool: AdapterPool | None = None

    def answer(
        self, waves, *, chunk=256, num_blocks=PLENTY_OF_BLOCKS, cached=True, places=8, in_use=8, drafts=0
    ):
        """What came out, by name: token ids with their log-probabilities; each wave to its end."""
        for cache in self.runner.kv_cache.layers:
            poison(cache)
        settings = SchedulerSettings(
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            max_running_requests=32,
            max_queued_requests=100,
            chunked_prefill_size=chunk,
            max_step_drafts=drafts,
            debug_checks=True,
        )
        self.pool = AdapterPool(self.runner.adapter_reader, max_loaded=places, max_in_use=in_use)
        cache = PrefixCache(num_blocks, BLOCK_SIZE, enabled=cached)
        self.core = EngineCore(settings, self.runner, cache, adapters=self.pool)
        if places >= NUM_ADAPTERS:  # read before, so that who shares a step does not hang on the disk
            num_missing = NUM_ADAPTERS
            for ref in self.refs:
                self.core.handle(LoadAdapter(ref.directory))
            while num_missing:
                num_missing -= sum(isinstance(message, AdapterLoaded) for message in self.core.step())
        answers: dict[str, list] = {}
        for wave in waves:
            for ask in wave:
                ref = None if ask.adapter is None else self.refs[ask.adapter]
                prompt = ask.prompt.astype("<i4").tobytes()
                self.core.handle(GenerateRequest(ask.name, prompt, ask.params, adapter=ref))
            while self.core.has_work:
                for message in self.core.step():
                    assert not isinstance(message, Failed), message
                    if isinstance(message, TokenChunk):
                        own = answers.setdefault(message.request_id, [])
                        own.append((message.token_ids, message.logprobs, message.prompt_logprobs))
        assert self.pool.num_in_use == 0
        self.pool.close()
        return {name: flat(chunks) for name, chunks in answers.items()}


def flat(chunks) -> tuple[list, list, list]:
    """Chunks of a prompt's scores are cut where its computation was."""
    token_ids, logprobs, prompt_logprobs = zip(*chunks, strict=True)
    return tuple(sum((part or [] for part in parts), []) for parts in (token_ids, logprobs, prompt_logprobs))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    model = make_model("mistral")
    base = save_model(model.bfloat16(), directory / "base")
    model = model.float()
    paths = []
    for number in range(NUM_ADAPTERS):
        wrapped = make_adapter(model, TARGETS[number % 5], rank=RANKS[number % 5], seed=number)
        paths.append(save_adapter(wrapped, directory / f"a{number}"))
        model = wrapped.unload()
    return base, paths


@pytest.fixture(scope="module")
def machine(files):
    return Machine(*files)


@pytest.fixture(scope="module")
def mix():
    return make_mix()


@pytest.fixture(scope="module")
def alone(machine, mix):
    return machine.answer([[ask] for ask in mix], cached=False)


def test_the_adapters_change_the_answers(machine, mix, alone):
    """Greedy answers to one prompt differ between all adapters and the base."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asks = [Ask(f"same{i}", mix[1].prompt, params, i) for i in (*range(NUM_ADAPTERS), None)]
    answers = machine.answer([asks])
    assert len({tuple(tokens) for tokens, _, _ in answers.values()}) == NUM_ADAPTERS + 1
    assert machine.core.stats().prompt_tokens_cached == 0, "the prompt was computed by another adapter"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("chunk", [16, 256])
def test_with_seven_others_and_the_base(machine, mix, alone, chunk, cached, monkeypatch):
    shared, launch = [], machine.runner.launch

    def noting(plan):
        shared.append(len({row.request.adapter for row in plan.rows}))
        return launch(plan)

    monkeypatch.setattr(machine.runner, "launch", noting)
    assert machine.answer([mix], chunk=chunk, cached=cached) == alone
    assert max(shared) >= (2 if chunk == 16 else NUM_ADAPTERS + 1), "they do not share steps"


def test_with_cache_hits(machine, mix, alone):
    again = [dataclasses.replace(ask, name=f"again {ask.name}") for ask in mix]
    answers = machine.answer([mix, again[::-1]])
    stats = machine.core.stats()
    # Prompts that are scored are computed again.
    assert stats.prompt_tokens_cached > sum(len(ask.prompt) for ask in mix) / 3
    assert {name: answers[name] for name in alone} == alone
    assert {name: answers[f"again {name}"] for name in alone} == alone


def assert_same_when_preempted(machine, mix, expected):
    """Short prompts with long answers come first: they are let in together, and do not fit to their end."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=0)
    crowd = [Ask(f"crowd{i}", np.array([30 + i], np.int32), params, i) for i in range(NUM_ADAPTERS)]
    expected = expected | machine.answer([[ask] for ask in crowd], cached=False)
    assert machine.answer([crowd + mix], num_blocks=FEW_BLOCKS) == expected
    assert machine.core.stats().num_preemptions > 0


def test_with_preemption(machine, mix, alone):
    assert_same_when_preempted(machine, mix, alone)


def test_with_drafts(machine, mix, alone, monkeypatch):
    texts = [ask.prompt.tolist() + alone[ask.name][0] for ask in mix]
    guesses = Oracle(texts, 0.3, VOCAB_SIZE, seed=1)
    guesses.install(monkeypatch)
    assert machine.answer([mix], drafts=MAX_DRAFTS) == alone
    assert guesses.num_right > 50 and guesses.num_cut_short > 10


@pytest.mark.parametrize(("places", "in_use"), [(1, 1), (2, 2), (5, 3)])
def test_with_few_places_after_eviction_and_reload(machine, mix, alone, places, in_use):
    again = [dataclasses.replace(ask, name=f"again {ask.name}") for ask in mix]
    answers = machine.answer([mix, again], places=places, in_use=in_use)
    assert machine.pool.num_evictions >= NUM_ADAPTERS
    assert machine.pool.num_loaded <= places
    assert {name: answers[name] for name in alone} == alone
    assert {name: answers[f"again {name}"] for name in alone} == alone


@pytest.mark.parametrize("isa", FMA_ISAS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_on_every_instruction_set_with_any_threads(files, mix, alone, isa, num_threads):
    assert Machine(*files, isa=isa, num_threads=num_threads).answer([mix], chunk=64) == alone


@pytest.mark.parametrize(
    "stored", [{"dtype": "float32"}, {"quantization": "int8"}, {"quantization": "int4"}], ids=str
)
def test_on_other_weights(files, mix, alone, stored):
    machine = Machine(*files, **stored)
    expected = machine.answer([[ask] for ask in mix], cached=False)
    assert expected != alone
    assert machine.answer([mix], chunk=16) == expected
    assert_same_when_preempted(machine, mix, expected)
    assert machine.answer([mix], num_blocks=FEW_BLOCKS, places=2, in_use=2) == expected
    assert machine.pool.num_evictions >= NUM_ADAPTERS - 2

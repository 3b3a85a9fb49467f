"""Same request, same answer: bit for bit, whoever shares the batch and whatever the cache does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine import _native
from engine.cache.prefix_cache import PrefixCache
from engine.models.any_model import read_any_spec
from engine.runner.model_runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.settings import SchedulerSettings
from helpers.attention import poison
from helpers.guessing import Oracle
from helpers.tiny_models import (
    KINDS,
    TRANSFORMERS_KINDS,
    VOCAB_SIZE,
    WRITTEN_OUT_KINDS,
    make_model,
    save_model,
)

BLOCK_SIZE = 16
PLENTY_OF_BLOCKS = 400
FEW_BLOCKS = 22
CONTEXT_LENGTH = 400
MAX_RUNNING = 32
MAX_DRAFTS = 100
FMA_ISAS = [isa for isa in _native.available_isas() if isa != "baseline"]
EOS = (2,)


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request of the mix."""

    name: str
    prompt: np.ndarray
    params: SamplingParams
    seed: int
    n: int = 1


def make_mix() -> list[Ask]:
    """24 requests: three groups of shared prefixes, identical prompts, and loners of odd lengths."""
    generator = np.random.default_rng(7)

    def tokens(count: int) -> np.ndarray:
        return generator.integers(3, VOCAB_SIZE, count).astype(np.int32)

    long, short, block = tokens(150), tokens(37), tokens(16)
    prompts = [np.concatenate([long, tokens(count)]) for count in (1, 2, 9, 16, 30, 50)]
    prompts += [np.concatenate([short, tokens(count)]) for count in (1, 5, 11, 27)]
    prompts += [long, long, long[:149], np.concatenate([long[:80], tokens(40)])]
    prompts += [block, np.concatenate([block, tokens(1)])]
    prompts += [tokens(count) for count in (1, 2, 15, 33, 64, 65, 129, 200)]
    styles = [
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 1.0, "logprobs": 0},
        {"temperature": 0.7, "top_p": 0.8, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.2, "top_k": 20, "logprobs": 20},
        {"temperature": 0.9, "min_p": 0.05, "frequency_penalty": 0.6, "presence_penalty": 0.3, "logprobs": 1},
        {"temperature": 1.0, "logit_bias": {5: 4.0, 6: -100.0}, "min_tokens": 20, "logprobs": 3},
    ]
    return [
        Ask(
            name=f"r{index}",
            prompt=prompt,
            params=SamplingParams(
                max_tokens=48 + index, ignore_eos=index % 5 == 0, **styles[index % len(styles)]
            ),
            seed=1000 + index,
            n=2 if index in (3, 20) else 1,
        )
        for index, prompt in enumerate(prompts)
    ]


@dataclasses.dataclass
class Answers:
    """What came out, by (name, choice): per token its id and the bits of its log-probabilities."""

    tokens: dict[tuple[str, int], list[tuple]] = dataclasses.field(default_factory=dict)
    num_preemptions: int = 0
    num_cached: int = 0


class Machine:
    """A model that serves mixes under different circumstances, with fresh caches each time."""

    def __init__(self, directory, *, dtype="bfloat16", isa="auto", num_threads=2, **options) -> None:
        self.runner = ModelRunner(
            read_any_spec(directory),
            directory,
            dtype=dtype,
            num_blocks=PLENTY_OF_BLOCKS,
            block_size=BLOCK_SIZE,
            context_length=CONTEXT_LENGTH,
            max_tokens=512 + MAX_RUNNING,
            max_rows=MAX_RUNNING,
            max_draws=MAX_RUNNING + MAX_DRAFTS,
            num_threads=num_threads,
            isa=isa,
            **options,
        )

    def answer(
        self, waves: list[list[Ask]], *, chunk=512, num_blocks=PLENTY_OF_BLOCKS, cached=True, drafts=0
    ) -> Answers:
        """Serve each wave to its end, all its requests at once; one cache for all waves."""
        for cache in self.runner.kv_cache.layers:
            poison(cache)  # what was never written must not be read
        settings = SchedulerSettings(
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            max_running_requests=MAX_RUNNING,
            max_queued_requests=100,
            chunked_prefill_size=chunk,
            eos_token_ids=EOS,
            max_step_drafts=drafts,
            debug_checks=True,
        )
        scheduler = Scheduler(settings, PrefixCache(num_blocks, BLOCK_SIZE, enabled=cached))
        answers = Answers()
        for wave in waves:
            for ask in wave:
                scheduler.submit(ask.name, ask.prompt, ask.params, seed=ask.seed, n=ask.n)
            while scheduler.has_work:
                self._step(scheduler, answers)
        answers.num_preemptions = scheduler.counters.num_preemptions
        answers.num_cached = scheduler.counters.prompt_tokens_cached
        return answers

    def _step(self, scheduler: Scheduler, answers: Answers) -> None:
        plan = scheduler.schedule()
        assert plan is not None
        result = self.runner.execute(plan)
        plan.accept(result.token_ids)
        first = 0
        for row, new in zip(plan.sampled_rows, scheduler.update(plan, result), strict=True):
            entries = answers.tokens.setdefault((new.request.request_id, new.request.choice), [])
            num_top = new.request.params.logprobs
            for draw, token_id in enumerate(new.token_ids, first):
                is_last = draw == first + row.num_accepted
                entry = [(token_id,), new.finish_reason if is_last else None]
                if num_top is not None:
                    entry.append(result.logprobs[draw].tobytes())
                    entry.append(result.top_ids[draw, :num_top].tobytes())
                    entry.append(result.top_logprobs[draw, :num_top].tobytes())
                entries.append(tuple(entry))
            first += 1 + row.num_drafts


def assert_same(actual: Answers, expected: Answers) -> None:
    assert actual.tokens.keys() == expected.tokens.keys()
    differing = [key for key, entries in expected.tokens.items() if actual.tokens[key] != entries]
    assert not differing


@pytest.fixture(scope="module")
def mix():
    return make_mix()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(make_model("mistral").bfloat16(), tmp_path_factory.mktemp("p1"))


@pytest.fixture(scope="module")
def machine(directory):
    return Machine(directory)


@pytest.fixture(scope="module")
def alone(machine, mix):
    """The answers to compare with: each request by itself, nothing cached, one chunk."""
    return machine.answer([[ask] for ask in mix], cached=False)


def test_the_mix_is_worth_comparing(alone):
    assert len(alone.tokens) == 26
    outputs = [[entry[0] for entry in entries] for entries in alone.tokens.values()]
    assert min(map(len, outputs)) >= 1 and sum(map(len, outputs)) > 400
    assert len({token for output in outputs for token in output}) > 200
    choices = [[entry[0] for entry in alone.tokens["r20", choice]] for choice in (0, 1)]
    assert choices[0] != choices[1]


def test_a_wrong_seed_is_noticed(machine, mix, alone):
    wrong = machine.answer([[dataclasses.replace(mix[1], seed=1)]])
    assert wrong.tokens["r1", 0] != alone.tokens["r1", 0]


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("cached", [False, True])
def test_together(machine, mix, alone, chunk, cached):
    answers = machine.answer([mix], chunk=chunk, cached=cached)
    assert_same(answers, alone)
    assert (answers.num_cached > 0) == cached


@pytest.mark.parametrize("cached", [False, True])
def test_alone_in_small_chunks(machine, mix, alone, cached):
    assert_same(machine.answer([[ask] for ask in mix], chunk=16, cached=cached), alone)


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("cached", [False, True])
def test_with_preemption(machine, mix, alone, chunk, cached):
    answers = machine.answer([mix], chunk=chunk, cached=cached, num_blocks=FEW_BLOCKS)
    assert answers.num_preemptions >= 3
    assert_same(answers, alone)


def oracle(mix: list[Ask], answers: Answers, error_rate: float) -> Oracle:
    """Knows the answers of a mix."""
    prompts = {ask.name: ask.prompt.tolist() for ask in mix}
    texts = [
        prompts[name] + [entry[0][0] for entry in entries] for (name, _), entries in answers.tokens.items()
    ]
    return Oracle(texts, error_rate, VOCAB_SIZE, seed=1)


@pytest.mark.parametrize("error_rate", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("num_blocks", [FEW_BLOCKS, PLENTY_OF_BLOCKS])
def test_with_drafts(machine, mix, alone, monkeypatch, error_rate, chunk, num_blocks):
    guesses = oracle(mix, alone, error_rate)
    guesses.install(monkeypatch)
    answers = machine.answer([mix], chunk=chunk, num_blocks=num_blocks, drafts=MAX_DRAFTS)
    assert_same(answers, alone)
    assert guesses.num_right > 50 and (guesses.num_cut_short > 10 or not error_rate)
    assert (answers.num_preemptions >= 3) == (num_blocks == FEW_BLOCKS)


def test_whole_prompts_from_the_cache(machine, mix, alone):
    again = [dataclasses.replace(ask, name=f"again {ask.name}") for ask in mix]
    answers = machine.answer([mix, again[::-1]])
    assert answers.num_cached > sum(len(ask.prompt) for ask in mix) / 2
    for (name, choice), entries in alone.tokens.items():
        assert answers.tokens[name, choice] == entries
        assert answers.tokens[f"again {name}", choice] == entries


@pytest.mark.parametrize("isa", FMA_ISAS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_instruction_set_and_number_of_threads(directory, mix, alone, isa, num_threads):
    machine = Machine(directory, isa=isa, num_threads=num_threads)
    assert_same(machine.answer([mix], chunk=64), alone)
    assert_same(machine.answer([mix], num_blocks=FEW_BLOCKS), alone)


def test_without_fma_each_answer_is_still_one(directory, mix):
    """The baseline rounds products, so its bits are its own; they too depend on nothing else."""
    machine = Machine(directory, isa="baseline")
    few = mix[::2]
    expected = machine.answer([[ask] for ask in few], cached=False)
    assert_same(machine.answer([few], chunk=16, num_blocks=FEW_BLOCKS), expected)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"mistral", "llama", "llama_linear", "qwen2_yarn"}))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_families(tmp_path, mix, kind, dtype, monkeypatch):
    machine = Machine(save_model(make_model(kind), tmp_path), dtype=dtype)
    few = mix[::3]
    expected = machine.answer([[ask] for ask in few], cached=False)
    assert_same(machine.answer([few], chunk=16), expected)
    oracle(few, expected, error_rate=0.2).install(monkeypatch)
    assert_same(machine.answer([few], drafts=MAX_DRAFTS), expected)


@pytest.mark.parametrize("kind", [*TRANSFORMERS_KINDS, *WRITTEN_OUT_KINDS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_families_through_transformers(tmp_path, mix, kind, dtype):
    machine = Machine(save_model(make_model(kind), tmp_path), dtype=dtype)
    assert machine.runner.verdict == (True, "")
    few = mix[::6]
    expected = machine.answer([[ask] for ask in few], cached=False)
    assert_same(machine.answer([few], chunk=16, num_blocks=FEW_BLOCKS), expected)
    assert_same(machine.answer([few]), expected)


@pytest.mark.parametrize("quantization", ["bf16_dot", "int8", "int4"])
def test_quantized_weights(directory, mix, quantization, monkeypatch):
    machine = Machine(directory, quantization=quantization)
    expected = machine.answer([[ask] for ask in mix], cached=False)
    assert_same(machine.answer([mix], chunk=16), expected)
    assert_same(machine.answer([mix], num_blocks=FEW_BLOCKS), expected)
    oracle(mix, expected, error_rate=0.2).install(monkeypatch)
    assert_same(machine.answer([mix], drafts=MAX_DRAFTS), expected)
    # AVX2 has no instruction for bf16_dot, and other bits than the two sets that may use it.
    isas = FMA_ISAS[-2:] if quantization == "bf16_dot" else FMA_ISAS
    for isa, num_threads in zip(isas, (1, 3, 1), strict=False):
        other = Machine(directory, isa=isa, num_threads=num_threads, quantization=quantization)
        assert_same(other.answer([mix], chunk=64), expected)


def test_int8_cache(directory, mix, monkeypatch):
    """A prefix found in the cache is read as codes; so is one that was just computed."""
    machine = Machine(directory, kv_cache_dtype="int8")
    expected = machine.answer([[ask] for ask in mix], cached=False)
    cached = machine.answer([mix, [dataclasses.replace(ask, name=f"again {ask.name}") for ask in mix]])
    assert cached.num_cached > sum(len(ask.prompt) for ask in mix) / 2
    for (name, choice), entries in expected.tokens.items():
        assert cached.tokens[name, choice] == cached.tokens[f"again {name}", choice] == entries
    assert_same(machine.answer([mix], chunk=16), expected)
    assert_same(machine.answer([mix], num_blocks=FEW_BLOCKS), expected)
    oracle(mix, expected, error_rate=0.2).install(monkeypatch)
    assert_same(machine.answer([mix], drafts=MAX_DRAFTS), expected)
    for isa, num_threads in zip(FMA_ISAS, (1, 3, 1), strict=False):
        other = Machine(directory, isa=isa, num_threads=num_threads, kv_cache_dtype="int8")
        assert_same(other.answer([mix], chunk=64), expected)

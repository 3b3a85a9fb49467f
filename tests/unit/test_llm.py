"""LLM and AsyncEngine over a real tokenizer and a fake model."""

import asyncio
import concurrent.futures
import signal

import pytest

from engine.core import llm as llm_module
from engine.core.async_engine import AsyncEngine
from engine.core.engine_core import EngineCore
from engine.core.llm import LLM
from engine.core.local_client import LocalClient
from engine.core.messages import EngineReady
from engine.errors import ConfigError, EngineError, InternalError, InvalidRequest
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings
from engine.text.tokenizer import Tokenizer
from helpers.engines import FakeRunner
from helpers.prefix_cache import PlainPrefixCache
from helpers.scheduling import answer_alone
from helpers.tokenizers import byte_level_tokenizer, save_tokenizer

VOCAB_SIZE = 300
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SETTINGS = SchedulerSettings(
    context_length=1024,
    vocab_size=VOCAB_SIZE,
    max_running_requests=4,
    max_queued_requests=0,
    chunked_prefill_size=64,
    debug_checks=True,
)
INFO = EngineReady(1024, 4, 16, 1024, "none", "cpu", "none", 1, 0)


def make_core():
    return EngineCore(SETTINGS, FakeRunner(64, 16, VOCAB_SIZE), PlainPrefixCache(64, 16), draw_seed=lambda: 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(byte_level_tokenizer(VOCAB_SIZE), directory, config={"chat_template": TEMPLATE})
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def llm(checkpoint, monkeypatch):
    monkeypatch.setattr(llm_module, "build_engine", lambda config: (make_core(), INFO))
    with LLM(str(checkpoint)) as llm:
        yield llm
        if llm._core is not None:
            assert not llm._core.has_work
            assert llm._core.stats().num_blocks_in_use == 0


def expected_ids(ids, params, choice=0):
    return answer_alone(ids, params, choice, vocab_size=VOCAB_SIZE).token_ids


def test_many_prompts_in_order_with_parameters_of_their_own(llm):
    prompts = ["The capital of France", [5, 6, 7], "one two three", "again"] * 5
    params = [SamplingParams(temperature=0, max_tokens=3 + i) for i in range(20)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        assert (output.prompt, output.prompt_token_ids) == (prompt if isinstance(prompt, str) else None, ids)
        (choice,) = output.outputs
        assert choice.token_ids == expected_ids(ids, own)
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)


def test_the_engine_is_kept_full(llm):
    llm.generate([[i] for i in range(16)], SamplingParams(max_tokens=10, ignore_eos=True), use_tqdm=False)
    assert llm._core._runner.num_steps <= 16 / SETTINGS.max_running_requests * 10 + 4


@pytest.mark.parametrize("prompt", ["The capital", [5, 6, 7]])
def test_one_prompt_is_a_list_of_one(llm, prompt):
    (output,) = llm.generate(prompt, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16
    assert llm.generate([], use_tqdm=False) == []


def test_choices_logprobs_and_cached_tokens(llm):
    params = SamplingParams(max_tokens=5, logprobs=2)
    llm.generate([[3] * 40], params, use_tqdm=False)
    (output,) = llm.generate([[3] * 40], params, n=3, use_tqdm=False)
    assert output.num_cached_tokens == 32
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    for choice in output.outputs:
        assert [token for token, _ in choice.logprobs] == choice.token_ids
        assert all(len(scores.top_ids) == 2 for _, scores in choice.logprobs)


def test_prompt_logprobs(llm):
    scoring, plain = SamplingParams(max_tokens=0, prompt_logprobs=3), SamplingParams(max_tokens=2)
    prompts = [[3] * 40, [7], list(range(1, 31))]
    outputs = llm.generate(prompts, [scoring, scoring, plain], use_tqdm=False)
    assert [o.prompt_logprobs if o.prompt_logprobs is None else len(o.prompt_logprobs) for o in outputs] == [
        39,
        0,
        None,
    ]
    assert all(len(scores.top_ids) == 3 for scores in outputs[0].prompt_logprobs)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * 3
    assert [len(o.outputs[0].token_ids) for o in outputs] == [0, 0, 2]


def test_stop_string_ends_the_choice(llm):
    free = llm.generate("again", SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)[0].outputs[0]
    stop = free.text[30:33]
    params = SamplingParams(temperature=0, max_tokens=200, stop=(stop,))
    cut = llm.generate("again", params, use_tqdm=False)[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.matched_stop) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 200


def test_chat_renders_the_template(llm):
    chat = [{"role": "user", "content": "one two"}]
    (output,) = llm.chat(chat, use_tqdm=False)
    assert output.prompt == "<user>one two"
    assert output.prompt_token_ids == llm.tokenizer.encode("<user>one two", add_special_tokens=False)
    assert [o.prompt for o in llm.chat([chat, chat], use_tqdm=False)] == ["<user>one two"] * 2


@pytest.mark.parametrize(
    "bad", ["hello", [5], [[{"role": "user", "content": "a"}], "x"], [{"role": "user", "content": 5}], [[]]]
)
def test_what_is_no_conversation_is_refused(llm, bad):
    with pytest.raises(InvalidRequest):
        llm.chat(bad, use_tqdm=False)


@pytest.mark.parametrize("bad", [[1] * 2000, [], [VOCAB_SIZE], [2**40], ["a", "b"], [1, 2.5], [1, "2"]])
def test_a_prompt_that_cannot_be_served_raises_and_leaves_nothing(llm, bad):
    with pytest.raises(InvalidRequest):
        llm.generate([[1, 2, 3], bad, [4]], use_tqdm=False)
    assert not llm._core.has_work
    assert len(llm.generate([[1, 2, 3]], use_tqdm=False)[0].outputs[0].token_ids) == 16


@pytest.mark.parametrize("n", [-1, 0, 5, 10**9])
def test_choices_that_can_never_be_served(llm, n):
    with pytest.raises(InvalidRequest) as caught:
        llm.generate([[1, 2, 3]], n=n, use_tqdm=False)
    assert caught.value.param == "n"


def test_wrong_number_of_parameters(llm):
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing_running(llm, error):
    runner = llm._core._runner
    execute = runner.execute

    def interrupted(plan):
        if runner.num_steps == 5:
            runner.num_steps += 1
            raise error
        return execute(plan)

    runner.execute = interrupted
    raised = KeyboardInterrupt if error is KeyboardInterrupt else InternalError
    with pytest.raises(raised):
        llm.generate([[i] * 20 for i in range(9)], SamplingParams(max_tokens=50), use_tqdm=False)
    assert not llm._core.has_work
    assert llm._core.stats().num_blocks_in_use == 0


def test_ctrl_c_in_a_step_waits_for_its_end(llm):
    execute = llm._core._runner.execute
    handler = signal.getsignal(signal.SIGINT)
    finished = []

    def interrupted(plan):
        if llm._core._runner.num_steps == 5:
            signal.raise_signal(signal.SIGINT)
        finished.append(execute(plan))
        return finished[-1]

    llm._core._runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[i] * 20 for i in range(9)], SamplingParams(max_tokens=50), use_tqdm=False)
    assert len(finished) == 6
    assert not llm._core.has_work
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_the_last_step_is_not_lost(llm):
    execute = llm._core._runner.execute

    def interrupted(plan):
        signal.raise_signal(signal.SIGINT)
        return execute(plan)

    llm._core._runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
    assert not llm._core.has_work


def test_threads_of_their_own_may_generate(llm):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        (output,) = pool.submit(llm.generate, [[1, 2]], use_tqdm=False).result()
    assert len(output.outputs[0].token_ids) == 16


def test_an_unknown_option_is_one_line(checkpoint):
    with pytest.raises(ConfigError, match="^unknown option: max_tokens$"):
        LLM(str(checkpoint), max_tokens=3)


def test_after_close_nothing_runs(llm):
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a")


def test_a_missing_model_is_one_line():
    with pytest.raises(ConfigError, match="^no such model directory: /no/such/model$"):
        LLM("/no/such/model")


def test_the_progress_bar_counts_prompts(llm, capsys):
    llm.generate([[1], [2], [3]])
    assert "3/3" in capsys.readouterr().err


def test_async_engine_streams_and_cancels(checkpoint):
    async def main():
        core = make_core()
        async with AsyncEngine(str(checkpoint), client=LocalClient(core, INFO)) as engine:
            params = SamplingParams(temperature=0, max_tokens=40)
            texts = [output.outputs[0].text async for output in engine.generate("again", params)]
            assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
            tokenizer = Tokenizer.from_directory(checkpoint)
            assert texts[-1] == tokenizer.decode(expected_ids(tokenizer.encode("again"), params))
            chat = engine.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=500), n=2)
            async for output in chat:
                if len(output.outputs[1].token_ids) > 3:
                    break
            await chat.aclose()
            assert core.stats().num_running == 0
            with pytest.raises(InvalidRequest, match="n is 1000000000, but at most 4 choices"):
                await anext(engine.generate("again", n=10**9))

    asyncio.run(main())

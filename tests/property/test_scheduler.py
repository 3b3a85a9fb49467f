"""Random walks of the scheduler: whatever happens around it, a request gets the answer it gets alone."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.prefix_cache import PrefixCache
from engine.errors import InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from helpers.prefix_cache import PlainPrefixCache
from helpers.scheduling import Harness, answer_alone

VOCAB_SIZE = 3
BLOCK_SIZE = 4
EOS = 2


def alone(prompt, params, choice):
    return _alone(prompt, msgspec.json.encode(params), choice)


@functools.cache
def _alone(prompt, encoded_params, choice):
    params = msgspec.json.decode(encoded_params, type=SamplingParams)
    return answer_alone(
        prompt, params, choice, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,)
    )


def make_params(greedy, max_tokens, min_tokens, ignore_eos, seed, prompt_logprobs):
    return SamplingParams(
        temperature=0 if greedy else 1,
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        ignore_eos=ignore_eos,
        prompt_logprobs=prompt_logprobs,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Tiny pools, a two-token vocabulary: prefixes collide and blocks run out all the time."""

    cache_kind: type = PlainPrefixCache

    @initialize(
        num_blocks=st.integers(10, 24),
        enabled=st.booleans(),
        policy=st.sampled_from(["fcfs", "lpm"]),
        chunk=st.sampled_from([1, 4, 5, 16, 64]),
        max_running=st.integers(1, 8),
        target_itl_s=st.sampled_from([None, 0.001]),
        way=st.sampled_from(
            [{"max_step_drafts": count} for count in (0, 1, 6, 64)] + 3 * [{"runs_ahead": True}]
        ),
    )
    def start(self, num_blocks, enabled, policy, chunk, max_running, target_itl_s, way):
        self.h = Harness(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            cache=self.cache_kind(num_blocks, BLOCK_SIZE, enabled),
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            schedule_policy=policy,
            chunked_prefill_size=chunk,
            max_running_requests=max_running,
            max_queued_requests=10,
            target_itl_s=target_itl_s,
            **way,
        )
        self.pool = num_blocks * BLOCK_SIZE
        self.asked = {}
        self.cancelled = set()
        self.count = 0

    @rule(
        start=st.sampled_from([0, 4, 8, 20, 33]),
        tails=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=4),
        params=st.builds(
            make_params,
            greedy=st.booleans(),
            max_tokens=st.integers(0, 40),
            min_tokens=st.integers(0, 40),
            ignore_eos=st.booleans(),
            seed=st.integers(0, 2),
            prompt_logprobs=st.sampled_from([None, None, 0, 2]),
        ),
        n=st.integers(1, 3),
        options=st.fixed_dictionaries(
            {
                "namespace": st.sampled_from(["", "", "other"]),
                "priority": st.sampled_from([0, 0, 0, 1, -3]),
                "client": st.sampled_from(["", "", "a", "b"]),
                "runs_alone": st.sampled_from([False, False, False, True]),
            }
        ),
    )
    def submit(self, start, tails, params, n, options):
        """A burst of prompts with a common start."""
        for tail in tails:
            self._submit_one([0, 1, 1] * (start // 3) + tail, params, n, options)

    def _submit_one(self, tokens, params, n, options):
        name = f"r{self.count}"
        self.count += 1
        too_long = len(tokens) + params.max_tokens > self.pool
        scheduler = self.h.scheduler
        places = scheduler.settings.max_running_requests + scheduler.settings.max_queued_requests
        try:
            self.h.submit(name, tokens, params, n=n, **options)
        except InvalidRequest:
            assert too_long
            return
        except Overloaded:
            assert scheduler.num_running + scheduler.num_waiting + n > places
            return
        assert not too_long
        for other in self.h.displaced:
            self.cancelled.update((other, choice) for choice in range(self.asked[other][2]))
        self.h.displaced.clear()
        if params.max_tokens:
            self.asked[name] = (tuple(tokens), params, n)
        elif params.prompt_logprobs is not None and len(tokens) > 1:  # scored by the first choice
            self.asked[name] = (tuple(tokens), params, 1)

    @rule(steps=st.integers(1, 12), seconds=st.sampled_from([0.0, 0.0001, 0.01]))
    def run_steps(self, steps, seconds):
        for _ in range(steps):
            self.h.now += seconds
            self.h.step()
            assert self.h.num_idle_steps == 0 or not self.h.scheduler.has_work or self.h.num_idle_steps < 2

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.h.scheduler.cancel(name)
        self.cancelled.update((name, choice) for choice in range(self.asked[name][2]))

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), choice=st.integers(0, 2))
    def cancel_choice(self, data, choice):
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.h.scheduler.cancel_choice(name, choice)
        self.cancelled.add((name, choice))

    @rule()
    def flush(self):
        self.h.scheduler.flush_cache()

    @precondition(lambda self: self.h.scheduler.has_work)
    @rule(is_launched=st.booleans())
    def fail_a_step(self, is_launched):
        self.h.fail_step(is_launched)

    @invariant()
    def blocks_are_conserved(self):
        if hasattr(self, "h"):
            self.h.scheduler.check()

    def teardown(self):
        if not hasattr(self, "h"):
            return
        self.h.run()
        for name in self.h.failed:
            self.cancelled.update((name, choice) for choice in range(self.asked[name][2]))
        assert self.h.cache.num_in_use == 0
        for name, (prompt, params, n) in self.asked.items():
            for choice in range(n):
                answer, expected = self.h.answers[name, choice], alone(prompt, params, choice)
                if answer.finish_reason is None:
                    assert (name, choice) in self.cancelled
                    assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
                else:
                    assert answer == expected


class NativeCacheMachine(SchedulerMachine):
    """The same walks over the native tree and allocator."""

    cache_kind = PrefixCache


for machine in (SchedulerMachine, NativeCacheMachine):
    machine.TestCase.settings = settings(
        max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestScheduler = SchedulerMachine.TestCase
TestSchedulerOnNativeCache = NativeCacheMachine.TestCase

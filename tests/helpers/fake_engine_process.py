"""An engine process without a model, for tests of its supervisor. Runs as a script.

The model path of the configuration picks the misfortune while loading; prompts that begin with one
of the tokens below pick one while running.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.core import engine_process
from engine.core.engine_core import EngineCore
from engine.core.messages import EngineReady
from engine.errors import CheckpointError, DeviceLost
from engine.scheduling.settings import SchedulerSettings
from helpers.engines import FakeRunner
from helpers.prefix_cache import PlainPrefixCache

NUM_BLOCKS, BLOCK_SIZE, VOCAB_SIZE = 64, 16, 50
RAISES, CRASHES, HANGS, SLOW, LOSES_GPU = 49, 48, 47, 46, 45
SETTINGS = SchedulerSettings(
    context_length=NUM_BLOCKS * BLOCK_SIZE,
    vocab_size=VOCAB_SIZE,
    max_running_requests=4,
    max_queued_requests=100,
    chunked_prefill_size=64,
    debug_checks=True,
)


class FragileRunner(FakeRunner):
    def execute(self, plan):
        for row in plan.rows:
            match int(row.request.token_ids[0]):
                case 49:
                    raise RuntimeError("this prompt cannot be computed")
                case 48:
                    ctypes.string_at(0)
                case 47:
                    time.sleep(3600)
                case 46:
                    time.sleep(0.01)
                case 45:
                    raise DeviceLost("the GPU computes nothing more for this process: illegal address")
        return super().execute(plan)


def make_core(board):
    runner = FragileRunner(NUM_BLOCKS, BLOCK_SIZE, VOCAB_SIZE)
    return EngineCore(SETTINGS, runner, PlainPrefixCache(NUM_BLOCKS, BLOCK_SIZE), board=board)


def build(config, progress, board):
    progress("loading weights", 0.5)
    match config.model_path:
        case "broken":
            raise CheckpointError("model.safetensors lacks the tensor lm_head.weight")
        case "bug":
            raise TypeError("two\nlines")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "slow":
            time.sleep(3600)
    ready = EngineReady(
        NUM_BLOCKS * BLOCK_SIZE, 4, BLOCK_SIZE, SETTINGS.context_length, "none", "cpu", "none", 1, 100
    )
    return make_core(board), ready


if __name__ == "__main__":
    engine_process._build = build
    sys.exit(engine_process.main(sys.argv[1:]))

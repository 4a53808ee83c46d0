"""What `patch` gives, for type checkers and editors."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from torch_rpa.hf._transformers import ContinuousBatchingConfig, GenerateDecoderOnlyOutput, GenerationOutput
from torch_rpa.hf.api.manager import Manager


class PatchedModel(Protocol):
    """A transformers model with the engine's methods; each is documented where its function stands, in `hf/api`.

    Whatever else the model has is untyped here, for no type says "this class, with other methods".
    """

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizer: Any = None,
        **generation_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Padded rows of token ids in, padded rows out."""

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = False,
        *,
        tokenizer: Any = None,
        seed: int | None = None,
        **generation_kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Answers to lists of token ids of any lengths, by request id, in the order of the inputs."""

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> Manager:
        """A manager for requests from any thread, not started."""

    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: Any = None,
    ) -> AbstractContextManager[Manager]:
        """A manager that is warmed up, started, and stopped at the end."""

    def warmup(self, progress_bar: bool = True) -> None:
        """Compile every program; no request compiles anything afterwards."""

    def __getattr__(self, name: str) -> Any: ...

"""A checkpoint's tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .results import UsageError, load_json

# Twice the largest published.
_MOST_BYTES = 64 << 20


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """What tokenizers raises, its panics too, as a sentence that begins with `what`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UsageError):
        raise
    except BaseException as error:  # bare Exception, and pyo3's PanicException, which is none
        raise UsageError(f"{what}: {error}") from None


class Tokenizer:
    """The checkpoint's tokenizer.json; without one, only token ids can be prompts and no text comes out."""

    def __init__(self, model_dir: str | Path) -> None:
        path = Path(model_dir) / "tokenizer.json"
        self._directory, self._tokenizer = Path(model_dir), None
        if path.exists():
            import tokenizers

            if path.stat().st_size > _MOST_BYTES:
                raise UsageError(f"{path} cannot be read as a tokenizer: it has over {_MOST_BYTES} bytes")
            with _errors(f"{path} cannot be read as a tokenizer"):
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
                # A prompt is taken as it is, whatever the file says, as transformers does.
                self._tokenizer.no_padding()
                self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise UsageError("the checkpoint has no tokenizer.json; give prompts as token ids with --prompts")
        with _errors("the checkpoint's tokenizer.json cannot encode a prompt"):
            return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str | None:
        if self._tokenizer is None:
            return None
        with _errors("the checkpoint's tokenizer.json cannot decode tokens"):
            return self._tokenizer.decode(list(token_ids))

    def chat(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, role and content a turn, as the checkpoint's chat template writes it; without
        one, its contents line by line."""
        template = self._template()
        if template is None:
            return self.encode("".join(turn["content"] + "\n" for turn in turns))
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        special = {k: v for k, v in self._settings().items() if k.endswith("_token")}
        special = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            text = environment.from_string(template).render(messages=turns, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise UsageError(f"the chat template of {self._directory} cannot be used: {error}") from None
        assert self._tokenizer is not None, "a template without a tokenizer is not asked for"
        with _errors("the checkpoint's tokenizer.json cannot encode a conversation"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _template(self) -> str | None:
        path = self._directory / "chat_template.jinja"
        if path.exists():
            return path.read_text()
        found = self._settings().get("chat_template")
        return found if isinstance(found, str) else None

    def _settings(self) -> dict:
        path = self._directory / "tokenizer_config.json"
        return load_json(path) if path.exists() else {}


def _refuse(message: str) -> None:
    raise UsageError(f"the chat template refuses this conversation: {message}")

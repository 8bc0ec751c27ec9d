"""A nanoYurii model for transformers. `bench.py export --format=hf` writes this file into a folder,
beside the model.py that the model was trained with:

    AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
"""

import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import GPT, GPTConfig, KVCache


class NanoYuriiConfig(PretrainedConfig):
    """model_args are those of GPTConfig; the other entries of config.json are what transformers and
    lm-eval look for."""

    model_type = "nanoyurii"

    def __init__(self, model_args: dict | None = None, **entries):
        self.model_args = model_args or {}
        super().__init__(**entries)


class Cache(KVCache):
    """The cache of transformers in the form in which model.py asks for one.

    attention_mask (B, S) is 0 where a row is padding, on either side; None: nowhere. The first
    token of a row that is none has the position 0.
    """

    def __init__(self, stored: DynamicCache, attention_mask: torch.Tensor | None):
        super().__init__()
        self.stored, self.attention_mask = stored, attention_mask
        self.length = stored.get_seq_length()

    def begin(self, idx: torch.Tensor, block_size: int) -> torch.Tensor:
        """A pass over the next tokens, idx (B, T): their positions (1 or B, T)."""
        places = super().begin(idx, block_size)  # (1, T)
        keys = torch.arange(self.length, device=idx.device)
        self.seen = keys <= places[0, :, None]  # (T, S)
        if self.attention_mask is None:
            return places
        is_text = self.attention_mask.bool()  # (B, S)
        itself = keys == places[0, :, None]  # (T, S): padding sees something, or it would be nan
        self.seen = (self.seen & is_text[:, None] | itself)[:, None]  # (B, 1, T, S)
        return (is_text.cumsum(1) - 1).clamp(min=0)[:, -idx.size(1):]

    def extend(self, k: torch.Tensor, v: torch.Tensor,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append k, v (B, H, T, d_head) of the pass; return all, and the mask of what is seen."""
        k, v = self.stored.update(k, v, self.call)
        self.call += 1
        return k, v, self.seen


class NanoYuriiForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoYuriiConfig
    base_model_prefix = "module"  # which nanoYurii takes off the names again, as it does DDP's
    _no_split_modules = ["Block"]  # what device_map="auto" puts on one device
    _tied_weights_keys = {"module.lm_head.weight": "module.transformer.wte.weight"}

    def __init__(self, config: NanoYuriiConfig):
        super().__init__(config)
        self.module = GPT(GPTConfig(**config.model_args))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """GPT starts its weights itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.module.transformer.wte

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.module.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                past_key_values: DynamicCache | None = None, use_cache: bool | None = None,
                labels: torch.Tensor | None = None, logits_to_keep: int = 0,
                **options) -> CausalLMOutputWithPast:
        """input_ids (B, T), labels (B, T) with -100 where nothing is predicted -> logits (B, T, V),
        or of the last logits_to_keep positions alone; and the loss."""
        for name in ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states"):
            value = options.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name} is not known to a nanoYurii model; leave it out")
        past_key_values = options.pop("cache", past_key_values)  # its name since transformers 5.24
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if not isinstance(past_key_values, (DynamicCache, type(None))):
            raise ValueError("the cache must be a DynamicCache; leave cache_implementation out")
        padded = attention_mask is not None and not attention_mask.all()
        stored = DynamicCache() if padded and past_key_values is None else past_key_values
        if padded:
            now = attention_mask[:, -input_ids.size(1):]
            input_ids = input_ids.masked_fill(now == 0, 0)  # the id of padding may be none of ours
        cache = None if stored is None else Cache(stored, attention_mask if padded else None)
        targets = None if logits_to_keep == 1 else input_ids  # with targets: every position
        logits = self.module(input_ids, targets, cache=cache)[0][:, -logits_to_keep:]  # -0: all
        loss = None
        if labels is not None:
            options.pop("return_dict", None)
            loss = self.loss_function(logits, labels, self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

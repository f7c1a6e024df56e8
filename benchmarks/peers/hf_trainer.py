"""Hugging Face's Trainer on a shape of ours:  hf_trainer.py '{"shape": ..., "precision": ...}' [FOLDER OF TORCH]

GPT2LMHeadModel or LlamaForCausalLM without dropout, fused AdamW, gradients clipped as by default, nothing
logged, saved or reported.  Timed between two calls of a callback inside Trainer.train: start-up is not
counted.  GPT-2 has biases of q, k and v that ours lacks: they are left out of the count of parameters.
"""

import json
import os
import sys
import tempfile
from typing import Any

# The project's own torch serves this environment too: 200 MB that need no second copy, and the same for all.
sys.path += sys.argv[2:]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import accelerate
import torch
import transformers
from turns import Turns, random_ids


def model_of(shape: dict[str, Any]) -> transformers.PreTrainedModel:
    if shape["positions"] == "rope":
        llama = transformers.LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["width"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape.get("kv_heads") or shape["heads"],
            max_position_embeddings=shape["context"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=shape["tie"],
            attn_implementation="sdpa",
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(llama)
    gpt = transformers.GPT2Config(
        vocab_size=shape["vocab"],
        n_positions=shape["context"],
        n_embd=shape["width"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_inner=shape["ffn"],
        activation_function=shape["mlp"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=shape["tie"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(gpt)


class Clock(transformers.TrainerCallback):
    def __init__(self, turns: Turns, about: dict[str, Any]) -> None:
        self.turns, self.about = turns, about

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = not self.turns.more(**self.about)
        return control


def main() -> None:
    spec = json.loads(sys.argv[1])
    turns = Turns(spec)
    torch.manual_seed(1)
    model = model_of(spec["shape"])
    about = {
        "parameters": sum(p.numel() for n, p in model.named_parameters() if not n.endswith("c_attn.bias")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    accumulate = spec.get("accumulate", 1)
    ids = random_ids(spec, 8 * spec["rows"] * accumulate)[:, :-1]
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            output_dir=out,
            max_steps=1_000_000,
            per_device_train_batch_size=spec["rows"],
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=spec["precision"] == "bf16",
            torch_compile=spec.get("compile", False),
            use_cpu=not turns.cuda,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            data_collator=transformers.default_data_collator,
            callbacks=[Clock(turns, about)],
        )
        trainer.train()


if __name__ == "__main__":
    main()

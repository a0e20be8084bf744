"""Everything that can be wrong with the settings, in one table: what was got, what was expected, how to cure it."""

from typing import NamedTuple

GOOD = {"model": "ByteDance/ContentV-8B", "prompts": "nano_train", "reward_funcs": ["clip_score"], "report_to": "none"}
RECOMPUTED = {"gradient_checkpointing": True}


class Row(NamedTuple):
    """A mistake and pieces of the message that answers it, in their order."""

    mistake: dict | str | list[str]  # settings; or the text of a whole config file; or flags
    got: str
    expected: str
    cure: str


ROWS = [
    # ------------------------------------------------------------------------------------ the file and the flags
    Row({"learing_rate": 1}, "config.yaml: key learing_rate", "no such setting", "did you mean 'learning_rate'?"),
    Row({"zzzz": 1}, "zzzz", "no such setting", "`train_rlhf.py --help` lists the settings"),
    Row(["--lora-rnk", "3"], "flag --lora-rnk", "no such setting", "did you mean 'lora_rank'?"),
    Row(["nano.yaml"], "got 'nano.yaml' without a flag", "expected --KEY VALUE", "did you mean --config nano.yaml?"),
    Row(["fast"], "got 'fast' without a flag", "expected --KEY VALUE", "name the setting before its value"),
    Row(["--max_steps", "few"], "argument --max_steps/--max-steps", "invalid int value: 'few'", "correct the flag"),
    Row(["--max_steps"], "argument --max_steps/--max-steps", "expected one argument", "correct the flag"),
    Row({"learing_rate": 1, "max_steps": 1.5}, "learing_rate", "no such setting", "did you mean 'learning_rate'?"),
    Row(["--learing_rate", "1", "--seed", "x"], "argument --seed", "int value", "correct the flag"),
    Row(["--config"], "--config: got no path", "expected a YAML file such as configs/nano.yaml", "correct the path"),
    Row(["--config", "absent.yaml"], "got absent.yaml, which is not a file", "expected a YAML", "correct the path"),
    Row(["--config", "{tmp}/latin.txt"], "latin.txt: got invalid", "expected UTF-8", "save it as UTF-8"),
    Row("a: [1", "config.yaml", "is not YAML", "correct that line"),
    Row("# nothing", "got an empty file", "expected lines of the form 'key: value'", "correct the file"),
    Row("seed: 1\nseed: 2", "key seed: got it in lines 1 and 2", "expected it once", "leave one out"),
    Row(
        "optimizer:\n  seed: 2",
        "key optimizer: got a section",
        "expected settings without sections",
        "at the left margin",
    ),
    Row("max_steps: ten", "config.yaml: max_steps: got 'ten'", "expected a whole number", "correct its value"),
    Row("- a\n- list", "got list", "expected lines of the form 'key: value'", "correct the file"),
    Row({"max_steps": 2.5}, "max_steps: got 2.5", "expected a whole number", "correct its value"),
    Row({"max_steps": float("inf")}, "max_steps: got inf", "expected a whole number", "correct its value"),
    Row({"learning_rate": float("inf")}, "learning_rate: got inf", "expected a number", "correct its value"),
    Row({"dry_run": 3}, "dry_run: got 3", "expected true or false", "correct its value"),
    Row({"seed": 2**64}, "seed: got 18446744073709551616", "expected a number of 64 bits", "choose another"),
    Row({"learning_rate": 10**400}, "learning_rate: got 1000", "expected a number", "correct its value"),
    Row({"seed": True}, "seed: got True", "expected a whole number", "correct its value"),
    Row({"reward_kwargs": {"a": 3}}, "got {'a': 3}", "expected a mapping {name: {argument: value}}", "correct its"),
    Row(
        ["--reward_caps", "{"], "reward_caps: got '{'", "expected a mapping {name: number} or none", "correct its value"
    ),
    Row({"reward_caps": "{"}, "reward_caps: got '{'", "expected a mapping {name: number} or none", "correct its value"),
    # --------------------------------------------------------------------------------- model, device and prompts
    Row({"model": "no/such/model"}, "model='no/such/model' is no folder here", "expected nano", "correct the name"),
    Row({"model": "{tmp}/half"}, "half lacks model_index.json", "expected a checkpoint", "pass the folder"),
    Row(
        {"model": "{tmp}/run"}, "run lacks", "expected a checkpoint", "this is a run directory: `python -m rlhf.export"
    ),
    Row({"device": "gpu"}, "device='gpu'", "expected one of", "correct the name"),
    Row({"device": "cuda:1"}, "device: got 'cuda:1'", "expected a kind", "hide the other devices from the process"),
    Row({"dtype": "float16"}, "dtype: got 'float16'", "expected one of auto, float32, bfloat16", "choose one"),
    Row({"prompts": "absent.txt"}, "got no file at", "expected a text file or one of nano_train", "correct the path"),
    Row({"prompts": "{tmp}/latin.txt"}, "prompt file {tmp}/latin.txt: got", "expected UTF-8", "save it as UTF-8"),
    Row({"prompts": "{tmp}/broken.jsonl"}, "broken.jsonl, line 2: got", 'a row such as {"prompt"', "correct it"),
    Row({"prompts": "{tmp}/text.jsonl"}, "text.jsonl: got the row", "rows with a 'prompt'", "pass a list"),
    Row({"eval_prompts": "{tmp}/empty.txt"}, "got no prompts", "expected one a line", "write at least one"),
    # --------------------------------------------------------------------------------------------------- rewards
    Row({"reward_funcs": []}, "reward_funcs: got none", "expected at least one reward", "name one"),
    Row({"reward_funcs": ["clip_scor"]}, "clip_scor", "expected one of aesthetic", "The nearest name is 'clip_score'"),
    Row({"reward_funcs": ["absent.py:A"]}, "got no file at", "expected a Python file", "Correct the path"),
    Row({"reward_funcs": ["aesthetic_v2_5"]}, "got no `head`", "expected the path of", "Download it"),
    Row({"eval_reward_funcs": ["clip_score"]}, "got 'clip_score' twice", "expected each once", "leave one out"),
    Row(
        {"eval_reward_funcs": ["judge.py:motion"]},
        "got 'motion'",
        "expected another name than those of the measures of every evaluation (motion, saturation",
        "rename the class or function",
    ),
    Row({"reward_weights": [1, 2]}, "reward_weights: got 2", "expected 1", "correct them"),
    Row({"reward_weights": [0]}, "reward_weights: got only zeros", "expected one that is not", "nothing would be"),
    Row({"reward_kwargs": {"clip_scor": {}}}, "got 'clip_scor'", "expected a reward of this run", "did you mean"),
    Row({"reward_caps": {"x": 0.3}}, "got 'x'", "expected a reward of this run", "the rewards are clip_score"),
    Row({"reward_targets": {"clip_scor": 1}}, "got 'clip_scor'", "expected a reward of this run", "did you mean"),
    Row(
        {"reward_caps": {"clip_score": 1}, "reward_targets": {"clip_score": 1}},
        "reward_caps and reward_targets: got 'clip_score' in both",
        "expected one of them",
        "leave one out",
    ),
    Row({"calibrate_rewards": 1}, "calibrate_rewards: got 1", "expected 0 or at least 2", "raise it"),
    Row(
        {"calibrate_rewards": 8, "normalise_rewards": False},
        "calibrate_rewards: got no normalise_rewards",
        "which uses what is measured",
        "set it, or calibrate none",
    ),
    # ---------------------------------------------------------------------------------------- numbers and choices
    Row({"max_steps": 0}, "max_steps: got 0", "expected at least 1", "raise it"),
    Row({"learning_rate": -1}, "learning_rate: got -1.0", "expected at least 0", "raise it"),
    Row({"adam_epsilon": 0}, "adam_epsilon: got 0.0", "expected more than 0", "raise it"),
    Row({"adam_beta2": 1.0}, "adam_beta2: got 1.0", "expected 0 <= adam_beta2 < 1", "correct it"),
    Row({"lr_scheduler_type": "cosine"}, "got 'cosine'", "expected one of constant, linear", "choose one"),
    Row({"height": 431}, "height=431", "not divisible by 16", "use 432"),
    Row({"num_frames": 16}, "num_frames=16", "is not 4k+1", "use 17"),
    Row({"report_to": ["tensorbord"]}, "report_to: got 'tensorbord'", "expected some of", "correct it"),
    Row({"report_to": ["clearml"]}, "got 'clearml'", "which is not installed", "pip install clearml"),
    # ------------------------------------------------------------------------------------------ method and drift
    Row({"num_grad_steps": 51}, "num_grad_steps=51", "exceeds num_inference_steps=50", "lower num_grad_steps"),
    Row({"method": "refl", "num_grad_steps": 4}, "got 4 with method refl", "expected 1", "change one of the two"),
    Row({"method": "alignprop"}, "num_grad_steps: got 1 with method alignprop", "expected at least 2", "raise it"),
    Row({"method": "refl", "jump_steps": 51}, "jump_steps=51", "expected at most that", "lower jump_steps"),
    Row(
        {"method": "drtune", "num_grad_steps": 42, "jump_steps": 10},
        "num_grad_steps=42 and jump_steps=10 leave too few steps",
        "may jump to x0 after 41 of num_inference_steps=50",
        "lower one of the first two",
    ),
    Row({"method": "listed"}, "grad_steps: got None", "expected different steps of 0 to 49", "correct them"),
    Row(
        {"guidance_gradient": "distill"},
        "guidance_gradient: got distill with drift_weight 0",
        "would teach the adapter no guidance",
        "set drift_weight above 0",
    ),
    Row(
        {"guidance_gradient": "distill", "drift_weight": 1, "guidance_scale": 1},
        "guidance_scale: got 1.0 with distill",
        "expected above 1",
        "there is no guidance to teach",
    ),
    Row({"drift_weighting": "even"}, "got even without drift_weight or anchor_steps", "expected kl", "set that, too"),
    Row({"anchor_steps": 1}, "anchor_steps: got 1", "expected 0 or at least 2", "raise it"),
    Row(
        {"method": "srpo", "align_sigmas": [0.5]},
        "align_sigmas=[0.5] with align_delta=0.02",
        "expected [from, to]",
        "correct them",
    ),
    Row({"relative_words": ["sharp"]}, "relative_words: got ['sharp']", "expected two phrases", "give both"),
    Row(
        {"lora_use_dora": True, "weight_decay": 0.1},
        "weight_decay: got 0.1 with train_blocks or lora_use_dora",
        "expected 0",
        "hold them with drift_weight instead",
    ),
    Row(
        {"train_blocks": ["transformer_blocks.38"]},
        "train_blocks: got 'transformer_blocks.38'",
        "expected transformer_blocks.0 to .37",
        "correct it",
    ),
    Row({"lora_rank_pattern": {"to_q": 0}}, "got 0 for 'to_q'", "expected at least 1", "raise it"),
    Row({"lora_rank_pattern": {"to_qq": 4}}, "got 'to_qq'", "expected the end of an adapted layer's", "correct it"),
    Row({"lora_alpha_pattern": {"to_q(": 4}}, "got 'to_q('", "or a regular expression of it", "correct it"),
    Row(
        {"train_blocks": ["transformer_blocks"]},
        "got transformer_blocks, which hold all layers that the adapter is for",
        "expected one at least to be left to it",
        "train fewer whole",
    ),
    Row({"train_blocks": ["blocks.3"]}, "got 'blocks.3'", "or another module of pos_embed", "correct it"),
    Row({"lora_target_modules": ["to_qq"]}, "got 'to_qq'", "expected the end of a linear layer's", "mean 'to_q'?"),
    # ------------------------------------------------------------------------------------------ speed and memory
    Row({"decode_checkpoint": True}, "decode_checkpoint: got no decode_chunk", "expected one", "set it to 1"),
    Row({"attention_kernel": "best"}, "attention_kernel: got 'best'", "expected one of auto", "choose one"),
    Row({"decode_window": 0}, "decode_window: got 0", "expected at least 1", "raise it"),
    Row({"decode_window": 17, "num_frames": 17}, "decode_window=17 is all of", "expected fewer", "leave it out"),
    Row({"keep_attention": True}, "keep_attention: got it without", "expected both", "set that, too"),
    Row({"decode_caches": "host"}, "decode_caches: got host without", "expected both", "set that, too"),
    Row(RECOMPUTED | {"stream_weights": True, "base_bits": 8}, "got both", "expected one", "leave one out"),
    Row(
        RECOMPUTED | {"stream_weights": True, "sampling_weights": "merged"},
        "sampling_weights: got merged with stream_weights",
        "expected own",
        "change one of the two",
    ),
    Row({"optim": "adam"}, "optim: got 'adam'", "expected one of adamw_torch_fused, adamw_bnb_8bit", "choose one"),
    Row(
        {"optim": "adamw_bnb_8bit", "train_blocks": ["transformer_blocks", "transformer_blocks.3"]},
        "optim=adamw_bnb_8bit: got train_blocks of 8,",
        "expected at most 2,147,483,647",
        "train fewer",
    ),
    Row({"optim": "adamw_bnb_8bit"}, "optim=adamw_bnb_8bit needs bitsandbytes", "is not installed", "pip install"),
    Row({"base_bits": 4}, "base_bits=4 needs bitsandbytes", "which is not installed", "pip install bitsandbytes"),
    Row(
        {"sampling_weights": "merged", "lora_use_dora": True},
        "got merged with lora_use_dora",
        "expected own",
        "change one of the two",
    ),
    Row({"prefix_steps": 5, "method": "uniform"}, "prefix_steps: got it with", "expected draft_k", "change one of"),
    Row({"prefix_steps": 49}, "prefix_steps=49", "only 49 of num_inference_steps=50 come before", "lower it"),
    Row(
        {"sampling_weights": "merged", "num_grad_steps": 50},
        "sampling_weights: got it with 0 of num_inference_steps=50 before the window",
        "expected at least 1",
        "lower num_grad_steps",
    ),
    Row({"guidance_together": True, "guidance_scale": 1.0}, "guidance_together: got it", "which has one", "leave it"),
    Row({"rollout_uses": 2, "drift_weight": 1.0}, "rollout_uses: got drift_weight", "expected 0", "leave one out"),
    Row(
        {"guidance_every": 2, "guidance_scale": 1.0},
        "guidance_every: got 2",
        "nothing is guided here, expected 1",
        "leave it out",
    ),
    # -------------------------------------------------------------------------------------------- several devices
    Row({"guidance_parallel": 3}, "guidance_parallel: got 3", "expected 1 or 2", "correct it"),
    Row({"sequence_parallel": 0}, "sequence_parallel: got 0", "expected at least 1", "raise it"),
    Row(
        {"sequence_parallel": 3},
        "guidance_parallel=1 x sequence_parallel=3 are 3 processes",
        "do not divide the 1 of this run",
        "or start 3 processes",
    ),
    Row({"ddp_timeout": 0}, "ddp_timeout: got 0", "expected at least 1 second", "raise it"),
    Row(
        {"guidance_parallel": 2, "guidance_together": True},
        "guidance_together: got True with guidance_parallel 2",
        "expected False",
        "change one",
    ),
    Row(
        {"guidance_parallel": 2, "guidance_scale": 1.0},
        "guidance_parallel: got 2 with guidance_scale 1.0",
        "which has one branch",
        "set it to 1",
    ),
    Row({"shard_base": True, "base_bits": 8}, "shard_base: got base_bits=8", "expected None", "leave one out"),
    Row({"shard_base": True}, "shard_base: got one process", "expected at least 2", "start more, or stream_weights"),
    # ------------------------------------------------------------------------------------- watching and the folder
    Row(
        {"early_stopping_patience": 2},
        "early_stopping_patience: got no eval_steps and no eval_reward_funcs",
        "expected evaluations during the training",
        "set them",
    ),
    Row(
        {"early_stopping_patience": 2, "eval_steps": 1, "eval_reward_funcs": ["flicker"], "num_eval_prompts": 1},
        "early_stopping_patience: got one held-out prompt",
        "expected two or more",
        "raise num_eval_prompts",
    ),
    Row({"output_dir": ""}, "output_dir: got an empty path", "expected a folder", "name one"),
    Row({"output_dir": "{tmp}/empty.txt"}, "is a file", "expected a folder or a new path", "choose another"),
    Row({"output_dir": "{tmp}/empty.txt/run"}, "got no right to write in {tmp}/empty.txt", "expected one", "choose"),
    Row({"output_dir": "{tmp}/locked/new"}, "got no right to write in {tmp}/locked", "expected one", "choose another"),
    Row({"output_dir": "{tmp}/run"}, "holds a run already", "expected a new folder", "--overwrite_output_dir"),
    Row(
        {"resume_from_checkpoint": "latest", "overwrite_output_dir": True},
        "resume_from_checkpoint and overwrite_output_dir: got both",
        "expected one of them",
        "leave one out",
    ),
    Row({"resume_from_checkpoint": "latest"}, "got no checkpoint", "expected folders step-N", "overwrite_output_dir"),
    Row(
        {"resume_from_checkpoint": "{tmp}/run"},
        "got the folder of a run",
        "expected one of its checkpoints, such as {tmp}/run/checkpoints/step-3",
        "name that",
    ),
    Row(
        {"output_dir": "{tmp}/run", "resume_from_checkpoint": "{tmp}/another/checkpoints/step-3"},
        "got a run with checkpoints of its own",
        "expected a new folder, or that of {tmp}/another/checkpoints/step-3",
        "choose another",
    ),
    Row(
        {"output_dir": "{tmp}/longer", "resume_from_checkpoint": "{tmp}/longer/checkpoints/step-3"},
        "step-3: got an older one",
        "expected the newest, since {tmp}/longer/checkpoints/step-5 would stay",
        "choose another output_dir, or 'latest'",
    ),
    Row(
        {
            "resume_from_checkpoint": "{tmp}/another/checkpoints/step-3",
            "load_best_model_at_end": True,
            "eval_steps": 1,
            "eval_reward_funcs": ["flicker"],
        },
        "load_best_model_at_end: got no {tmp}/another/best_adapter",
        "expected the best adapter of the run",
        "copy it there, or leave the setting out",
    ),
    Row({"resume_from_checkpoint": "absent"}, "got no checkpoint there", "expected a folder such as", "correct the"),
    Row(
        {"output_dir": "{tmp}/run", "resume_from_checkpoint": "latest", "lora_rank": 7},
        "lora_rank: got 7",
        "expected 16 as in",
        "set it back, or start another output_dir",
    ),
]

"""A table of all that can be wrong with settings: what was got, what was expected, the cure."""

import itertools
from typing import NamedTuple

GOOD = {"model": "ByteDance/ContentV-8B", "prompts": "nano_train", "reward_funcs": ["clip_score"], "report_to": "none"}
RECOMPUTED = {"gradient_checkpointing": True}


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefg")
)


class Row(NamedTuple):
    """A mistake and the message that answers it: got, expected and cure, with ... for the rest."""

    mistake: dict | str | list[str]  # settings; or the text of a whole config file; or flags
    told: str


ROWS = [
    # ----------------------------------------------------------------------- the file and the flags
    Row({"learing_rate": 1}, "config.yaml: key learing_rate ... no such setting ... did you mean 'learning_rate'?"),
    Row({"zzzz": 1}, "zzzz ... no such setting ... `train_rlhf.py --help` lists the settings"),
    Row(["--lora-rnk", "3"], "flag --lora-rnk ... no such setting ... did you mean 'lora_rank'?"),
    Row(["nano.yaml"], "got 'nano.yaml' without a flag ... expected --KEY VALUE ... did you mean --config nano.yaml?"),
    Row(["fast"], "got 'fast' without a flag ... expected --KEY VALUE ... name the setting before its value"),
    Row(["--max_steps", "few"], "max_steps: got 'few' ... expected a whole number ... correct its value"),
    Row(["--max_steps"], "argument --max_steps/--max-steps ... expected one argument ... correct the flag"),
    Row({"learing_rate": 1, "max_steps": 1.5}, "learing_rate ... no such setting ... did you mean 'learning_rate'?"),
    Row(["--learing_rate", "1", "--seed", "x"], "seed: got 'x' ... expected a whole number ... correct its value"),
    Row(["--shard_base", "maybe"], "shard_base: got 'maybe' ... expected true or false ... correct its value"),
    Row(["--config"], "--config: got no path ... expected a YAML file such as configs/nano.yaml ... correct the path"),
    Row(["--config", "absent.yaml"], "got absent.yaml, which is not a file ... expected a YAML ... correct the path"),
    Row(["--config", "{tmp}/latin.txt"], "latin.txt: got invalid ... expected UTF-8 ... save it as UTF-8"),
    Row("a: [1", "config.yaml ... is not YAML ... correct that line"),
    Row(
        "a: &a\n  b: *a", "config.yaml is not YAML: *a refers to itself ... expected settings in ... correct that line"
    ),
    Row(
        "a: " + "[" * 10**5, "config.yaml is not YAML: 33 nested levels ... expected settings in ... correct that line"
    ),
    Row("a: " + "x" * 10**6, "is not YAML: 1000003 characters ... expected settings ... correct that line"),
    Row(LAUGHS, "is not YAML: more than 20000 values ... expected settings in ... correct that line"),
    Row("learning_rate: 2024-99-99", "config.yaml is not YAML ... month must be in 1..12 ... correct that line"),
    Row("a: !!timestamp x", "config.yaml ... is not YAML ... correct that line"),
    Row(["--reward_kwargs", "[" * 10**5], "reward_kwargs: got '[[[ ... expected a mapping ... correct its value"),
    Row("# nothing", "got an empty file ... expected lines of the form 'key: value' ... correct the file"),
    Row("seed: 1\nseed: 2", "key seed: got it in lines 1 and 2 ... expected it once ... leave one out"),
    Row(
        "reward_caps:\n  a: 1\n  a: 2",
        "key reward_caps.a: got it in lines 2 and 3 ... expected it once ... leave one out",
    ),
    Row(
        "optimizer:\n  seed: 2",
        "key optimizer: got a section ... expected settings without sections ... at the left margin",
    ),
    Row("env: {A: b}", "key env: got {'A': 'b'} ... expected settings alone ... where the command starts"),
    Row("max_steps: ten", "config.yaml: max_steps: got 'ten' ... expected a whole number ... correct its value"),
    Row("- a\n- list", "got list ... expected lines of the form 'key: value' ... correct the file"),
    Row(["--memory_limit_gib", "0"], "memory_limit_gib: got 0.0 ... expected more than 0 ... correct its value"),
    Row({"max_steps": 2.5}, "max_steps: got 2.5 ... expected a whole number ... correct its value"),
    Row(
        {"initial_adapter": "no"}, "initial_adapter: no: got nothing there ... expected an adapter ... correct the path"
    ),
    # ----------------------------------------------------------------- settings of earlier versions
    Row(["--num_draws", "3"], "flag --num_draws ... no longer a setting ... it moved to method_kwargs, {num_draws"),
    Row(["--rollout-uses", "3"], "flag --rollout-uses ... no longer a setting ... it is now 'rollout_reuse'"),
    Row(["--eval_width", "64"], "flag --eval_width ... no longer a setting ... it moved to eval_size, {width: VALUE}"),
    Row(["--lora_use_dora", "1"], "flag --lora_use_dora ... no longer a setting ... give the trainer peft_config"),
    Row(["--optim", "x"], "flag --optim ... no longer a setting ... it is gone; leave it out"),
    Row({"train_blocks": ["proj_out"]}, "config.yaml: train_blocks: got ['proj_out'] ... expected none ... adapt more"),
    Row({"base_bits": 8}, "config.yaml: base_bits: got 8 ... no longer has ... choose 4"),
    Row({"dry_run": True}, "config.yaml: dry_run ... expected the flag --dry_run ... leave it out"),
    Row({"max_steps": float("inf")}, "max_steps: got inf ... expected a whole number ... correct its value"),
    Row({"learning_rate": float("inf")}, "learning_rate: got inf ... expected a number ... correct its value"),
    Row({"learning_rate": 10**400}, "learning_rate: got 1000 ... expected a number ... correct its value"),
    Row({"seed": True}, "seed: got True ... expected a whole number ... correct its value"),
    Row({"reward_kwargs": {"a": 3}}, "got {'a': 3} ... expected a mapping {name: {argument: value}} ... correct its"),
    Row(
        ["--reward_caps", "{"],
        "reward_caps: got '{' ... expected a mapping {name: number} or none ... correct its value",
    ),
    Row(
        {"reward_caps": "{"}, "reward_caps: got '{' ... expected a mapping {name: number} or none ... correct its value"
    ),
    # -------------------------------------------------------------------- model, device and prompts
    Row({"model": "no/such/model"}, "model='no/such/model' is no folder here ... expected nano ... correct the name"),
    Row({"model": "{tmp}/half"}, "half lacks model_index.json ... expected a checkpoint ... pass the folder"),
    Row(
        {"model": "{tmp}/run"},
        "run lacks ... expected a checkpoint ... this is a run directory: `python -m rlhf.export",
    ),
    Row({"device": "gpu"}, "device='gpu' ... expected one of ... correct the name"),
    Row({"device": "cuda:1"}, "device: got 'cuda:1' ... expected a kind ... hide the other devices from the process"),
    Row({"prompts": "absent.txt"}, "got no file at ... expected a text file or one of nano_train ... correct the path"),
    Row({"prompts": "{tmp}/latin.txt"}, "prompt file {tmp}/latin.txt: got ... expected UTF-8 ... save it as UTF-8"),
    Row({"prompts": "{tmp}/broken.jsonl"}, 'broken.jsonl, line 2: got ... a row such as {"prompt" ... correct it'),
    Row({"prompts": "{tmp}/text.jsonl"}, 'text.jsonl, line 1: got ... a row such as {"prompt" ... correct it'),
    Row(
        {"eval_prompts": "absent.txt"},
        "got no file at ... expected a text file or one of nano_train ... correct the path",
    ),
    Row({"eval_prompts": "{tmp}/empty.txt"}, "got no prompts ... expected a text file of ... write at least one"),
    # -------------------------------------------------------------------------------------- rewards
    Row({"reward_funcs": []}, "reward_funcs: got none ... expected at least one reward ... name one"),
    Row(
        {"reward_funcs": ["clip_scor"]}, "clip_scor ... expected one of aesthetic ... The nearest name is 'clip_score'"
    ),
    Row({"reward_funcs": ["absent.py:A"]}, "got no file at ... expected a Python file ... Correct the path"),
    Row({"reward_funcs": ["aesthetic_v2_5"]}, "got no `head` ... expected the path of ... Get it"),
    Row({"eval_reward_funcs": ["clip_score"]}, "got 'clip_score' twice ... expected each once ... leave one out"),
    Row(
        {"eval_reward_funcs": ["judge.py:motion"]},
        "got 'motion' ... expected another name than those of the measures of every evaluation (motion, saturation ... "
        "rename the class or function",
    ),
    Row({"reward_weights": [1, 2]}, "reward_weights: got 2 ... expected 1 ... or give --reward_weights none"),
    Row({"reward_weights": [0]}, "reward_weights: got only zeros ... expected one that is not ... nothing would be"),
    Row({"reward_kwargs": {"clip_scor": {}}}, "got 'clip_scor' ... expected a reward of this run ... did you mean"),
    Row(
        {"reward_kwargs": {"clip_score": {"frames": "half"}}},
        "got frames='half' ... expected 'first', 'all' ... expected",
    ),
    Row({"eval_reward_funcs": ["nano_verifer"]}, "nano_verifer ... expected one of aesthetic ... nano_verifier"),
    Row(
        {"reward_caps": {"x": 0.3}},
        "got 'x' ... expected a reward of this run ... are clip_score; give --reward_caps none",
    ),
    Row({"reward_targets": {"clip_scor": 1}}, "got 'clip_scor' ... expected a reward of this run ... did you mean"),
    Row(
        {"reward_caps": {"clip_score": 1}, "reward_targets": {"clip_score": 1}},
        "reward_caps and reward_targets: got 'clip_score' in both ... expected one of them ... leave one out",
    ),
    Row({"calibrate_rewards": 1}, "calibrate_rewards: got 1 ... expected 0 or at least 2 ... raise it"),
    Row(
        {"calibrate_rewards": 8, "normalise_rewards": False},
        "calibrate_rewards: got no normalise_rewards ... which uses what is measured ... set it, or calibrate none",
    ),
    # -------------------------------------------------------------------------- numbers and choices
    Row({"height": 431}, "height=431 ... not divisible by 16 ... use 432"),
    Row({"width": 8}, "width=8 ... not divisible by 16 (VAE times patch of ByteDance/ContentV-8B) ... use 16"),
    Row({"num_frames": 16}, "num_frames=16 ... is not 4k+1 ... use 17"),
    Row({"eval_size": {"num_frames": 16}}, "eval_size: num_frames=16 ... is not 4k+1 ... use 17"),
    Row({"eval_size": {"width": 1000}}, "eval_size: width=1000 ... is not divisible by 16 ... use 992"),
    Row({"eval_size": {"frames": 17}}, "eval_size: got 'frames' ... expected height, width, num_frames ... correct it"),
    Row({"report_to": ["tensorbord"]}, "report_to: got 'tensorbord' ... expected some of ... correct it"),
    Row({"report_to": ["clearml"]}, "got 'clearml' ... which is not installed ... pip install clearml"),
    Row({"max_steps": 0}, "max_steps: got 0 ... expected at least 1 ... correct its value"),
    Row(
        {"max_grad_norm": 1e-30}, "max_grad_norm: got 1e-30 ... expected at least 1e-11 ... or 0 for no limit; raise it"
    ),
    Row(
        {"max_grad_norm": 1e-20, "adam_epsilon": 1e-30},
        "max_grad_norm: got 1e-20, with which no weight would move ... expected at least 1e-12 ... raise it",
    ),
    Row({"learning_rate": -1}, "learning_rate: got -1.0 ... expected at least 0 ... correct its value"),
    Row({"adam_epsilon": 0}, "adam_epsilon: got 0.0 ... expected more than 0 ... correct its value"),
    Row({"adam_beta2": 1.0}, "adam_beta2: got 1.0 ... expected at least 0, less than 1 ... correct its value"),
    Row({"seed": 2**64}, "seed: got 18446744073709551616 ... less than 2**64 ... correct its value"),
    Row({"lr_scheduler_type": "step"}, "got 'step' ... expected one of constant, linear, cosine ... correct its value"),
    Row({"base_bits": 3}, "config.yaml: base_bits: got 3 ... expected 4 or none ... correct its value"),
    Row({"guidance_parallel": 3}, "guidance_parallel: got 3 ... expected one of 1, 2 ... correct its value"),
    Row(["--method", "ddpo"], "method: got 'ddpo' ... expected one of draft_k ... correct its value"),
    Row({"guidance_scale": 0}, "guidance_scale: got 0.0 ... expected more than 0, at most 1000 ... correct its value"),
    Row(["--guidance_scale", "-3"], "guidance_scale: got -3.0 ... expected more than 0 ... correct its value"),
    Row(["--guidance_scale", "nan"], "guidance_scale: got 'nan' ... expected a number or none ... correct its value"),
    Row({"reward_kwargs": {"clip_score": {"x": [float("nan")]}}}, "reward_kwargs: got ... nan ... correct its value"),
    Row({"cpu_threads": 100000}, "cpu_threads: got 100000 ... expected at least 1, at most 1024 ... correct its value"),
    Row({"lora_alpha": 1e30}, "lora_alpha: got 1000 ... expected at least 1, at most 65536 ... correct its value"),
    Row({"reward_weights": [1e30]}, "reward_weights: got 1e+30 ... at most 1e+09 ... correct its value"),
    Row({"max_steps": 10**12}, "max_steps: got 1000000000000 ... expected at least 1, at most 1e+09 ... correct its"),
    # ----------------------------------------------------------------------------- method and drift
    Row({"num_grad_steps": 51}, "num_grad_steps=51 ... exceeds num_inference_steps=50 ... lower num_grad_steps"),
    Row({"method": "refl", "num_grad_steps": 4}, "got 4 with method refl ... expected 1 ... change one of the two"),
    Row({"method": "alignprop"}, "num_grad_steps: got 1 with method alignprop ... expected at least 2 ... raise it"),
    Row(
        {"method": "refl", "method_kwargs": {"jump_steps": 51}}, "jump_steps=51 ... expected at most that ... lower it"
    ),
    Row(
        {"method_kwargs": {"num_draws": 3}},
        "method_kwargs: got num_draws with method draft_k ... "
        "expected relative_words, relative_strength ... choose method draft_lv or srpo, which has it",
    ),
    Row(
        {"method": "srpo", "method_kwargs": {"num_drws": 3}},
        "method_kwargs: got 'num_drws' ... expected an option of method srpo ... did you mean 'num_draws'?",
    ),
    Row({"method_kwargs": {"zzz": 3}}, "method_kwargs: got 'zzz' ... expected an option of ... leave it out"),
    Row(
        {"method": "auto", "method_kwargs": {"num_draws": 3}},
        "method_kwargs: got num_draws with method draft_k ... "
        "expected relative_words ... choose method draft_lv or srpo, which has it",
    ),
    Row({"method": "nft"}, "got 1 with method nft ... expected a multiple of that ... change it, or group_size"),
    Row(
        {"method": "nft", "per_device_train_batch_size": 8, "method_kwargs": {"num_levels": 51}},
        "num_levels: got 51 ... expected at most num_inference_steps=50 ... lower it",
    ),
    Row(
        {"method": "nft", "per_device_train_batch_size": 8, "drift_weight": 1},
        "drift_weight: got 1.0 with method nft ... expected 0 ... leave it out",
    ),
    Row(
        ["--method", "draft_lv", "--method_kwargs", "{num_draws: 0}"],
        "method_kwargs: num_draws: got 0 ... expected at least 1 ... correct its value",
    ),
    Row(
        {"method": "draft_lv", "method_kwargs": {"num_draws": "few"}},
        "method_kwargs: num_draws: got 'few' ... expected a whole number ... correct its value",
    ),
    Row({"method": "listed"}, "steps: got None ... expected different steps of 0 to 49 ... correct them"),
    Row(
        {"method": "listed", "method_kwargs": {"steps": [3, 50]}},
        "steps: got [3, 50] ... expected different steps of 0 to 49 ... correct them",
    ),
    Row(
        {"method": "srpo", "method_kwargs": {"align_sigmas": [0.9, 0.99]}},
        "align_sigmas=[0.9, 0.99] with align_delta=0.02 ... "
        "expected [from, to] with align_delta <= from ... correct them",
    ),
    Row(
        {"method_kwargs": {"relative_words": ["sharp"]}},
        "relative_words: got ['sharp'] ... expected two phrases ... give both",
    ),
    Row(
        {"method_kwargs": {"relative_strength": 2}},
        "relative_strength: got 2.0 without relative_words ... expected 0.2 ... set both or none",
    ),
    Row(
        {"method": "drtune", "num_grad_steps": 42, "method_kwargs": {"jump_steps": 10}},
        "num_grad_steps=42 and jump_steps=10 leave too few steps ... "
        "may jump to x0 after 41 of num_inference_steps=50 ... lower one of the first two",
    ),
    Row(
        {"guidance_gradient": "distill"},
        "guidance_gradient: got distill with drift_weight 0 ... "
        "would teach the adapter no guidance ... set drift_weight above 0",
    ),
    Row(
        {"guidance_gradient": "distill", "method": "adjoint_matching"},
        "guidance_gradient: got distill with method adjoint_matching ... expected full, text or none ... change one of",
    ),
    Row(
        {"guidance_gradient": "distill", "method": "srpo", "method_kwargs": {"offline": True}},
        "guidance_gradient: got distill with method srpo offline ... expected full, text or none ... change one of",
    ),
    Row(
        {"guidance_gradient": "distill", "drift_weight": 1, "guidance_scale": 1},
        "guidance_scale: got 1.0 with distill ... expected above 1 ... there is no guidance to teach",
    ),
    *(
        Row(
            {"method_kwargs": {"negative_drift_weight": 1}, name: value},
            f"negative_drift_weight: got 1.0 with {name} {value} ... expected 0.0 ... {cure}",
        )
        for name, value, cure in (
            ("drift_weight", 1.0, "set one of the two to 0"),
            ("guidance_scale", 1.0, "set that above 1, or leave this out"),
            ("rollout_reuse", 2, "leave one of the two out"),
            ("anchor_steps", 2, "leave one of the two out"),
            ("method", "adjoint_matching", "leave it out"),
        )
    ),
    Row({"anchor_steps": 1}, "anchor_steps: got 1 ... expected 0 or at least 2 ... raise it"),
    Row(
        {"method_kwargs": {"anchor_data_steps": 2}},
        "anchor_data_steps: got it without anchor_data ... expected a folder of real videos ... set that, too",
    ),
    Row(
        {"method": "srpo", "method_kwargs": {"offline": True}, "drift_weight": 0.1},
        "drift_weight: got 0.1 with offline ... has no rollout, expected 0.0 ... leave it out",
    ),
    Row(
        {"method_kwargs": {"anchor_data_weight": 2}},
        "anchor_data_weight: got 2.0 without anchor_data_steps ... expected 1.0 ... set both, or leave it out",
    ),
    Row(
        {"anchor_data": "nowhere"}, "which nothing reads, expected anchor_data_steps, or ... expected ... leave it out"
    ),
    Row(
        {"guidance_gradient": "distill", "drift_weight": 1, "method_kwargs": {"anchor_data_steps": 2}},
        "guidance_gradient: got distill with anchor_data_steps ... "
        "expected full, text or none ... change one of the two",
    ),
    Row(
        {"method": "flow_grpo", "num_inference_steps": 1, "per_device_train_batch_size": 8},
        "num_inference_steps: got 1 with method flow_grpo ... "
        "expected at least 2, since its last step has no noise ... raise it",
    ),
    Row(
        {"method": "leap_align", "num_inference_steps": 1},
        "num_inference_steps: got 1 with method leap_align ... expected at least 2 ... raise it",
    ),
    Row(
        {"method": "adjoint_matching", "method_kwargs": {"adjoint_steps": 51}},
        "adjoint_steps=51 exceeds num_inference_steps=50 ... expected at most that ... lower it",
    ),
    Row(
        {"method": "prfl", "method_kwargs": {"drawn_steps": 51}},
        "drawn_steps=51 exceeds num_inference_steps=50 ... expected at most that ... lower it",
    ),
    Row(
        {"method": "adjoint_matching", "drift_weight": 0.1},
        "drift_weight: got 0.1 with method adjoint_matching ... expected 0 ... leave it out",
    ),
    Row(
        {"method": "nft", "per_device_train_batch_size": 8, "method_kwargs": {"reward_perturbation": 0.1}},
        "reward_perturbation: got 0.1 with method nft ... expected 0 ... leave it out",
    ),
    Row(
        {"method": "prfl"},
        "method: got prfl with clip_score ... expected a reward of latents ... distil one by `python -m",
    ),
    Row({"reward_mix": "min"}, "reward_mix: got min with the rewards clip_score ... expected at least two ... add one"),
    Row(
        {"reward_mix": "min", "reward_funcs": ["clip_score", "hps_v2"], "reward_weights": [1, -1]},
        "reward_mix: got min with reward_weights [1.0, -1.0] ... expected none below 0 ... correct them",
    ),
    Row({"lora_target_modules": ["all_linear"]}, "got 'all_linear' ... expected the end of ... mean 'all-linear'?"),
    Row({"lora_target_modules": ["to_qq"]}, "got 'to_qq' ... expected the end of a linear layer's ... mean 'to_q'?"),
    # ----------------------------------------------------------------------------- speed and memory
    Row({"decode_checkpoint": True}, "decode_checkpoint: got no decode_chunk ... expected one ... set it to 1"),
    Row({"decode_window": 17, "num_frames": 17}, "decode_window=17 is all of ... expected fewer ... leave it out"),
    Row({"keep_attention": True}, "keep_attention: got it without ... expected both ... set that, too"),
    Row(
        RECOMPUTED | {"stream_weights": True, "base_bits": 4},
        "stream_weights and base_bits: got both ... expected one ... leave one out",
    ),
    Row({"base_bits": 4}, "base_bits=4 needs bitsandbytes ... which is not installed ... pip install bitsandbytes"),
    Row(
        {"rollout_reuse": 2, "num_grad_steps": 50},
        "rollout_reuse: got it with 0 of num_inference_steps=50 before the window ... "
        "expected at least 1 ... lower num_grad_steps",
    ),
    Row({"rollout_reuse": 2, "method": "alignprop", "num_grad_steps": 2}, "got it with ... draft_lv ... change one of"),
    Row({"decode_caches": "host"}, "decode_caches: got host without ... expected both ... set that, too"),
    Row({"prefix_steps": 1, "method": "srpo"}, "prefix_steps: got it with ... expected draft_k ... change one of"),
    Row({"prefix_steps": 5, "method": "uniform"}, "prefix_steps: got it with ... expected draft_k ... change one of"),
    Row({"prefix_steps": 49}, "prefix_steps=49 ... only 49 of num_inference_steps=50 come before ... lower it"),
    Row({"guidance_together": True, "guidance_scale": 1.0}, "guidance_together: got it ... which has one ... leave it"),
    Row({"rollout_reuse": 2, "drift_weight": 1.0}, "rollout_reuse: got drift_weight ... expected 0 ... leave one out"),
    # ------------------------------------------------------------------------------ several devices
    Row(
        {"sequence_parallel": 3},
        "guidance_parallel=1 x sequence_parallel=3 are 3 processes ... "
        "do not divide the 1 of this run ... or start 3 processes",
    ),
    Row(
        {"guidance_parallel": 2, "guidance_together": True},
        "guidance_together: got True with guidance_parallel 2 ... expected False ... change one",
    ),
    Row(
        {"guidance_parallel": 2, "guidance_scale": 1.0},
        "guidance_parallel: got 2 with guidance_scale 1.0 ... which has one branch ... set it to 1",
    ),
    Row({"shard_base": True, "base_bits": 4}, "shard_base: got base_bits=4 ... expected None ... leave one out"),
    Row({"shard_base": True}, "shard_base: got one process ... expected at least 2 ... start more, or stream_weights"),
    # ---------------------------------------------------------------------- watching and the folder
    Row(
        {"early_stopping_patience": 2},
        "early_stopping_patience: got no eval_steps and no eval_reward_funcs ... "
        "expected evaluations during the training ... set them",
    ),
    Row(
        {"early_stopping_patience": 2, "eval_steps": 1, "eval_reward_funcs": ["flicker"], "num_eval_prompts": 1},
        "early_stopping_patience: got one held-out prompt ... expected two or more ... raise num_eval_prompts",
    ),
    Row(
        {"load_best_model_at_end": True, "eval_steps": 2, "eval_reward_funcs": ["flicker"], "eval_prompts": None},
        "load_best_model_at_end: got no eval_prompts ... expected evaluations during the training ... set them",
    ),
    Row({"output_dir": ""}, "output_dir: got an empty path ... expected a folder ... name one"),
    Row({"output_dir": "{tmp}/empty.txt"}, "is a file ... expected a folder or a new path ... choose another"),
    Row({"output_dir": "{tmp}/empty.txt/run"}, "got no right to write in {tmp}/empty.txt ... expected one ... choose"),
    Row(
        {"output_dir": "{tmp}/locked/new"}, "got no right to write in {tmp}/locked ... expected one ... choose another"
    ),
    Row({"output_dir": "{tmp}/run"}, "holds a run already ... expected a new folder ... --overwrite_output_dir"),
    Row(
        {"output_dir": "{tmp}/linked", "overwrite_output_dir": True},
        "overwrite_output_dir: got links in {tmp}/linked, checkpoints ... "
        "expected what can be removed ... remove them yourself",
    ),
    Row(
        {"resume_from_checkpoint": "latest", "overwrite_output_dir": True},
        "resume_from_checkpoint and overwrite_output_dir: got both ... expected one of them ... leave one out",
    ),
    Row({"resume_from_checkpoint": "latest"}, "got no checkpoint ... expected folders step-N ... overwrite_output_dir"),
    Row(
        {"resume_from_checkpoint": "{tmp}/run"},
        "got the folder of a run ... "
        "expected one of its checkpoints, such as {tmp}/run/checkpoints/step-3 ... name that",
    ),
    Row(
        {"output_dir": "{tmp}/run", "resume_from_checkpoint": "{tmp}/another/checkpoints/step-3"},
        "got a run with checkpoints of its own ... "
        "expected a new folder, or that of {tmp}/another/checkpoints/step-3 ... choose another",
    ),
    Row(
        {"output_dir": "{tmp}/longer", "resume_from_checkpoint": "{tmp}/longer/checkpoints/step-3"},
        "step-3: got an older one ... expected the newest, since {tmp}/longer/checkpoints/step-5 would stay ... "
        "choose another output_dir, or 'latest'",
    ),
    Row(
        {
            "resume_from_checkpoint": "{tmp}/another/checkpoints/step-3",
            "load_best_model_at_end": True,
            "eval_steps": 1,
            "eval_reward_funcs": ["flicker"],
        },
        "load_best_model_at_end: got no {tmp}/another/best_adapter ... "
        "expected the best adapter of the run ... copy it there, or leave the setting out",
    ),
    Row(
        {"output_dir": "{tmp}/spoilt", "resume_from_checkpoint": "auto"},
        "spoilt/checkpoints/step-3: manifest.json is missing ... "
        "or no run in {tmp}/spoilt. Nothing was removed ... put a checkpoint back, choose another output_dir",
    ),
    Row(
        {"output_dir": "{tmp}/unreadable", "resume_from_checkpoint": "latest"},
        "state.json: got a damaged file (TypeError: step is None) ... expected it as it was written ... restore it",
    ),
    Row(
        {"output_dir": "{tmp}/busy"},
        "busy: got a folder in which process 7 on another trains ... expected one run a folder ... choose another",
    ),
    Row(
        {"output_dir": "{tmp}/mixed"},
        "mixed: got the file samples, the folder summary.json in it ... expected what a run leaves ... move it away",
    ),
    Row(
        {"resume_from_checkpoint": "{tmp}/run/checkpoints/step-3", "output_dir": "{tmp}/on", "max_steps": 2},
        "max_steps: got 2 ... expected at least the 3 steps of ... raise it",
    ),
    Row({"resume_from_checkpoint": "absent"}, "got no checkpoint there ... expected a folder such as ... correct the"),
    Row(
        {"output_dir": "{tmp}/run", "resume_from_checkpoint": "latest", "lora_rank": 7},
        "lora_rank: got 7 ... expected 16 as in ... set it back, or start another output_dir",
    ),
]

"""A judge by questions: its processor's own path on whole numbers, gradients, weights, written answers."""

import pytest
import torch
import transformers
from reward_checks import make_video
from tiny_qwen import FAMILIES, in_float64, judge_model

from rewards import RewardError, load_reward, probe
from rewards.models.vlm_question import VlmQuestion, byte_processor, read_number

QUESTION, PROMPTS = "Is this {prompt} ? Answer with Yes or No.", ["a red fox", "rain"]
INFO = {"fps": 8, "seed": 0, "step": 0}


def published(model, processor, video_CTHW, question, frames, fps=8):
    """log p(Yes) - log p(No) by the processor's own path, from whole numbers 0 .. 255."""
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    written = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[written],
        videos=[(video_CTHW[:, frames] * 255).round().to(torch.uint8).transpose(0, 1)],
        video_metadata=[{"total_num_frames": video_CTHW.shape[1], "fps": fps, "frames_indices": list(frames)}],
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    log_p = model(**inputs).logits[0, -1].log_softmax(-1)
    yes, no = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    return (log_p[yes] - log_p[no]).item()


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request):
    return VlmQuestion(QUESTION, model=judge_model(request.param), dtype="float32", num_frames="4 fps")


def whole(video):
    return (video * 255).round() / 255


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 64, 96), (5, 64, 64), (1, 128, 64)])
def test_the_score_is_that_of_the_processors_own_path(judge, frames, height, width):
    side = judge.processor.video_processor.patch_size * 2
    video = whole(make_video(frames, height * side // 32, width * side // 32))  # no size that is rounded
    scores = judge(video, PROMPTS, **INFO)
    seen = list(range(0, frames, 2)) if frames > 1 else [0, 0]
    for score, clip, prompt in zip(scores, video, PROMPTS, strict=True):
        asked = QUESTION.replace("{prompt}", prompt)
        assert score.item() == pytest.approx(published(judge.model, judge.processor, clip, asked, seen), abs=2e-4)
    assert (scores[0] - scores[1]).abs() > 1e-2


def test_other_sizes_are_resized_as_the_processor_does(judge):
    video = whole(make_video(4, 70, 90))
    asked = [QUESTION.replace("{prompt}", prompt) for prompt in PROMPTS]
    expected = [published(judge.model, judge.processor, *pair, [0, 2]) for pair in zip(video, asked, strict=True)]
    assert judge(video, PROMPTS, **INFO).tolist() == pytest.approx(expected, abs=0.05)  # it rounds pixels to 1/255


def test_the_contract_holds(judge):
    report = probe(judge, (3, 4, 64, 64), PROMPTS, info={"fps": 8})
    assert report.frames == 4


def test_the_gradient_is_that_of_finite_differences(monkeypatch):
    in_float64(monkeypatch)
    judge = VlmQuestion(QUESTION, model=judge_model("Qwen2VL", torch.float64), dtype="float64", num_frames=None)
    video = make_video(2, 60, 64, batch=1).double() * 0.8 + 0.1
    way = torch.randn(video.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pixels = video.clone().requires_grad_()
    (grad,) = torch.autograd.grad(judge(pixels, PROMPTS[:1], **INFO).sum(), pixels)
    above, below = (judge(video + step * way, PROMPTS[:1], **INFO).item() for step in (1e-5, -1e-5))
    assert (grad * way).sum().item() == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_the_gradient_of_each_family_points_where_the_score_rises(judge):
    video = make_video(4, 64, 64, batch=1) * 0.8 + 0.1
    pixels = video.clone().requires_grad_()
    (grad,) = torch.autograd.grad(judge(pixels, PROMPTS[:1], **INFO).sum(), pixels)
    way = grad / grad.norm()
    above, below = (judge(video + step * way, PROMPTS[:1], **INFO).item() for step in (0.02, -0.02))
    assert (above - below) / 0.04 == pytest.approx(grad.norm().item(), rel=0.02)


def test_questions_are_weighed_and_chunks_change_nothing():
    model, video = judge_model("Qwen2VL"), make_video(2, 56, 56).requires_grad_()
    make = lambda questions, **more: VlmQuestion(questions, model=model, dtype="float32", num_frames=None, **more)
    first, second = (make(text)(video, PROMPTS, **INFO) for text in (QUESTION, "Is this a bird ?"))
    assert torch.allclose(make([QUESTION, "Is this a bird ?"])(video, PROMPTS, **INFO), (first + second) / 2)
    weighed = make({QUESTION: 3, "Is this a bird ?": -1})(video, PROMPTS, **INFO)
    assert torch.allclose(weighed, (3 * first - second) / 4, atol=1e-6)
    chunked = make(QUESTION, chunk=1)(video, PROMPTS, **INFO)
    assert torch.equal(chunked, first)
    grads = [torch.autograd.grad(scores.sum(), video)[0] for scores in (first, chunked)]
    torch.testing.assert_close(*grads)
    swapped = make(QUESTION, answers=["No", "Yes"])(video, PROMPTS, **INFO)
    assert torch.allclose(swapped, -first)


def test_written_answers_are_read_as_numbers(monkeypatch):
    model, processor = judge_model("Qwen2_5_VL")
    judge = VlmQuestion("Grade {prompt} by a number.", generate=True, model=(model, processor), dtype="float32")
    assert not judge.differentiable
    video = make_video(2, 56, 56)
    with pytest.raises(RewardError, match="got the answer .* to 'Grade a red fox by a number.', with . numbers in it"):
        judge(video, PROMPTS, **INFO)
    said = processor.tokenizer.encode("7", add_special_tokens=False)[0]
    bias = torch.zeros(len(processor.tokenizer))
    bias[said] = 1e4
    hook = model.lm_head.register_forward_hook(lambda module, given, logits: logits + bias)
    judge.max_tokens = 1
    assert judge(video.requires_grad_(), PROMPTS, **INFO).tolist() == [7.0, 7.0]
    hook.remove()


def test_numbers_of_answers():
    for answer, number in {"7": 7, " 7.5.": 7.5, "Grade: 8/10": 8, "-1": -1, "7 / 10!": 7}.items():
        assert read_number("judge", answer, "?") == number
    for answer in ("", "seven", "between 3 and 4", "On a scale of 1 to 10: 7", "nan"):
        with pytest.raises(RewardError, match="expected exactly one number"):
            read_number("judge", answer, "?")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": []}, "expected a question, a list, or"),
        ({"questions": {QUESTION: 0}}, "expected a question"),
        ({"questions": {QUESTION: "3"}}, "got the weight '3'"),
        ({"questions": 3}, "expected a question"),
        ({"answers": [True, False]}, "Write both in quotes"),
        ({"answers": True}, "Write both in quotes"),
        ({"answers": ["Yes", "a red fox"]}, "of 1 and 5 tokens"),
        ({"max_pixels": 0}, "max_pixels=0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(RewardError, match=message):
        VlmQuestion(**{"questions": QUESTION} | settings, model=judge_model("Qwen2VL"), dtype="float32")


def test_a_prompt_with_a_token_of_the_model_is_refused():
    judge = VlmQuestion(model=judge_model("Qwen2VL"), dtype="float32")
    with pytest.raises(RewardError, match=r"got the prompt 'a <\|video_pad\|>' with <\|video_pad\|> in it"):
        judge.check_prompts(["rain", "a <|video_pad|>"])


def test_max_pixels_bounds_the_tokens():
    count = lambda judge: judge._inputs(make_video(2, 112, 112)[0], "?", clock)["video_grid_thw"].prod().item()
    clock = {"total_num_frames": 2, "fps": 8, "frames_indices": [0, 1]}
    whole, small = (VlmQuestion(model=judge_model("Qwen2VL"), dtype="float32", max_pixels=n) for n in (None, 56 * 56))
    assert (count(whole), count(small)) == (64, 16)


def test_a_folder_is_loaded_and_another_family_refused(tmp_path):
    model, processor = judge_model("Qwen2VL")
    model.save_pretrained(tmp_path / "qwen")
    processor.save_pretrained(tmp_path / "qwen")
    loaded = load_reward("vlm_question", model=str(tmp_path / "qwen"), questions=QUESTION, dtype="float32")
    video = make_video(4, 56, 56)
    expected = VlmQuestion(QUESTION, model=(model, processor), dtype="float32")(video, PROMPTS, **INFO)
    torch.testing.assert_close(loaded(video, PROMPTS, **INFO), expected)
    small = load_reward("vlm_question", model=str(tmp_path / "qwen"), dtype="float32", max_pixels=56 * 56)
    assert small(make_video(4, 112, 112), PROMPTS, **INFO).isfinite().all()
    transformers.CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(RewardError, match="a model of type clip; expected one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        load_reward("vlm_question", model=str(tmp_path / "clip"))
    with pytest.raises(RewardError, match="no weights for '/nowhere'"):
        load_reward("vlm_question", model="/nowhere")


def test_random_weights_read_bytes():
    model, _ = judge_model("Qwen2_5_VL")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for number, name in enumerate(names, start=290):
        setattr(model.config, name, number)
    model.resize_token_embeddings(300, mean_resizing=False)
    judge = VlmQuestion(model=(model, byte_processor(model.config)), dtype="float32")
    assert probe(judge, (3, 4, 64, 64)).frames == 4

"""Each wrong argument is refused where it is passed, under the name that the caller used; the session stays fresh."""

import numpy as np
import pytest
import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.stages.schedule import Schedule

torch.manual_seed(0)
MODEL = CausalLingBotTransformer(LingBotConfig.preset("tiny"))
NOISE, TEXT = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 16, 64)
LATENTS = torch.randn(1, 36, 3, 8, 12)

SCHEDULES = {
    "timesteps tensor": (dict(timesteps=torch.tensor([1000.0, 500.0])), TypeError, r"timesteps: got Tensor.*tolist"),
    "timesteps number": (dict(timesteps=1000.0), TypeError, "timesteps: got 1000.0, must be a sequence"),
    "timesteps bool": (dict(timesteps=(True, False)), TypeError, "timesteps: got True, must be a finite number"),
    "timesteps text": (dict(timesteps="1000"), TypeError, "timesteps: got '1000', must be a sequence"),
    "timesteps nan": (dict(timesteps=(float("nan"),)), ValueError, "timesteps: got nan"),
    "shift tensor": (dict(shift=torch.tensor(5.0)), TypeError, "shift: got Tensor, must be a finite number"),
    "shift nan": (dict(shift=float("nan")), ValueError, "shift: got nan"),
    "shift bool": (dict(shift=True), TypeError, "shift: got True"),
    "sigmas tensor": (dict(timesteps=(999.0,), sigmas=torch.ones(1)), TypeError, "sigmas: got Tensor"),
    "noise_sigmas text": (
        dict(timesteps=(999.0, 1.0), sigmas=(1, 0.5), noise_sigmas=("a",)),
        TypeError,
        "noise_sigmas",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), SCHEDULES.values(), ids=list(SCHEDULES))
def test_a_schedule_is_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        CausalDenoisingStage(MODEL, **arguments)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, object])
def test_numpy_times_are_read_exactly(dtype):
    times = np.array([1000, 750, 500, 250], dtype)
    assert CausalDenoisingStage(MODEL, timesteps=times).schedule == CausalDenoisingStage(MODEL).schedule
    assert all(type(time) is float for time in Schedule.make("continuous", times, np.float32(5)).times)


CHUNKS = {
    "text list": (dict(text=[TEXT]), TypeError, "text: got list, must be a float tensor"),
    "text numpy": (dict(text=TEXT.numpy()), TypeError, "text: got ndarray, must be a float tensor"),
    "text none": (dict(text=None), TypeError, "text: got NoneType"),
    "camera numpy": (dict(camera=np.zeros(3)), TypeError, "camera: got ndarray"),
    "noise numpy": (dict(noise=NOISE.numpy()), TypeError, "noise: got ndarray"),
    "condition list": (dict(condition=[1]), TypeError, "condition: got list"),
    "renoise numpy": (dict(renoise=NOISE.numpy()), TypeError, "renoise: got ndarray"),
    "start_frame float": (dict(start_frame=0.0), ValueError, "start_frame: got 0.0, must be an int of 0 or more"),
    "start_frame bool": (dict(start_frame=False), ValueError, "start_frame: got False"),
    "start_frame negative": (dict(start_frame=-1), ValueError, "start_frame: got -1"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), CHUNKS.values(), ids=list(CHUNKS))
def test_a_chunk_is_refused_before_anything_runs(arguments, error, message):
    state = RealtimeCausalDiTState()
    before = torch.get_rng_state()
    call = {"noise": NOISE, "text": TEXT, **arguments}
    with pytest.raises(error, match=message):
        CausalDenoisingStage(MODEL).denoise_chunk(state, call.pop("noise"), **call)
    assert state.kv_cache is None and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("state", [None, RealtimeCausalDiTState, {}], ids=["None", "class", "dict"])
def test_a_state_that_is_none_is_named(state):
    stage, message = CausalDenoisingStage(MODEL), "state: got .*, must be a RealtimeCausalDiTState"
    with pytest.raises(TypeError, match=message):
        MODEL(LATENTS, TEXT, 900.0, state=state, start_frame=0)
    with pytest.raises(TypeError, match=message):
        stage.denoise_chunk(state, NOISE, text=TEXT)
    with pytest.raises(TypeError, match=message):
        stage.update_context(state, NOISE, text=TEXT)
    with pytest.raises(TypeError, match=message):
        stage.rollout(state, 1, text=TEXT, latent_size=(8, 12))


@pytest.mark.parametrize("count", [-1, 1.0, True, "2", None, torch.tensor(2)])
def test_a_rollout_refuses_its_count_at_once(count):
    with pytest.raises(ValueError, match=r"num_chunks: got .*, must be an int of 0 or more"):
        CausalDenoisingStage(MODEL).rollout(RealtimeCausalDiTState(), count, text=TEXT, latent_size=(8, 12))


@pytest.mark.parametrize("name", ["text", "noise", "condition", "camera"])
def test_a_rollout_refuses_numpy_at_once(name):
    with pytest.raises(TypeError, match=rf"{name}: got a numpy array"):
        CausalDenoisingStage(MODEL).rollout(RealtimeCausalDiTState(), 1, **{"text": TEXT, name: np.zeros((1, 2))})


def test_exact_numpy_scalars_give_the_bits_of_python_numbers():
    plain, numpy = RealtimeCausalDiTState(), RealtimeCausalDiTState()
    for frame in (0, 3):
        want = MODEL(LATENTS, TEXT, 500.0, state=plain, start_frame=frame, step_index=1)
        got = MODEL(LATENTS, TEXT, np.float16(500), state=numpy, start_frame=np.int64(frame), step_index=np.int32(1))
        assert torch.equal(want, got)
    assert numpy.stats()["next_frame"] == 6 and type(numpy.stats()["next_frame"]) is int


@pytest.mark.parametrize("timestep", [True, torch.tensor(1.0), "1", None, float("nan"), np.array([1.0])])
def test_a_time_that_is_none_is_refused(timestep):
    state = RealtimeCausalDiTState()
    with pytest.raises(TypeError, match=r"timestep: got .*must be one finite Python float"):
        MODEL(LATENTS, TEXT, timestep, state=state, start_frame=0)
    assert state.kv_cache is None


@pytest.mark.parametrize("generator", [3, "cpu", torch.Generator, np.random.default_rng(0)])
def test_a_generator_that_is_none_is_refused_at_once(generator):
    stage, message = CausalDenoisingStage(MODEL), "generator: got .*, must be a torch.Generator or None"
    with pytest.raises(TypeError, match=message):
        stage.denoise_chunk(RealtimeCausalDiTState(), NOISE, text=TEXT, generator=generator)
    with pytest.raises(TypeError, match=message):
        stage.rollout(RealtimeCausalDiTState(), 1, text=TEXT, latent_size=(8, 12), generator=generator)


@pytest.mark.parametrize("size", [8, "8", (8,), (8, 12, 3), (-8, 12), (8, 12.0), (True, 12), (8, None)])
def test_a_latent_size_that_is_none_is_refused_at_once(size):
    with pytest.raises((TypeError, ValueError), match=r"latent_size: got .*, must be (\(H, W\)|an int of 1 or more)"):
        CausalDenoisingStage(MODEL).rollout(RealtimeCausalDiTState(), 1, text=TEXT, latent_size=size)


@pytest.mark.parametrize("entries", [0, -1, 1.5, True, "5", None])
def test_a_session_refuses_a_number_of_entries(entries):
    with pytest.raises(ValueError, match=r"time_entries: got .*, must be an int of 1 or more"):
        RealtimeCausalDiTState(time_entries=entries)
    assert RealtimeCausalDiTState(time_entries=np.int64(3)).switches["time_entries"] == 3


@pytest.mark.parametrize("name", ["rope_cache", "time_cache", "camera_cache", "text_cache"])
@pytest.mark.parametrize("value", ["no", 0, 1, None])
def test_a_session_refuses_a_switch_that_is_none(name, value):
    with pytest.raises(TypeError, match=f"{name}: got .*, must be True or False"):
        RealtimeCausalDiTState(**{name: value})

"""The reward-hacking watch: each sign alone, and a run whose reward is flawed."""

import copy
import json
import logging

import pytest
import torch

from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.errors import ConfigError, NumericsError
from fastrl.evaluation import generate_for
from fastrl.metrics import RunFolder
from fastrl.models import response_logprobs
from fastrl.parsing import parse_config
from fastrl.report import write_report
from fastrl.reward_settings import WatchConfig
from fastrl.trainers.common import derive_seed
from fastrl.trainers.ppo import PPOTrainer
from fastrl.watch import RewardWatch, Sight, distinct_n, find_alarms, repetition
from tests.trainers.ppo_task import PROMPTS, SETTINGS, score_even, tiny_critic, tiny_model

VALUES = {"length": 20.0, "entropy": 2.0, "distinct_1": 0.5, "distinct_2": 0.8, "repetition": 0.1,
          "kl": 0.0, "kl_start_policy": 0.0}


def sight(iteration=0, proxy=(0.0, 0.0), gold=None, **values):
    return Sight(iteration, torch.tensor(proxy, dtype=torch.float64),
                 None if gold is None else torch.tensor(gold, dtype=torch.float64),
                 {**VALUES, **values})


def alarms(*sights, **settings):
    return find_alarms(sights, WatchConfig(**settings))


def test_distinct_and_repeated_pieces():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[1], []], 2) == 1.0
    assert repetition([[1, 2, 3, 4, 5]]) == 0.0  # two 4-grams, both new
    assert repetition([[7] * 8]) == pytest.approx(4 / 5)  # five, one of them new
    assert repetition([[7] * 8, [1, 2, 3], [1, 2, 3, 4]]) == pytest.approx(2 / 5)
    assert repetition([[1]]) == 0.0


@pytest.mark.parametrize("sign, well, bad", [
    ("length", 39.0, 41.0), ("length", 11.0, 9.0), ("repetition", 0.29, 0.31),
    ("distinct_2", 0.41, 0.39), ("entropy", 0.51, 0.49)])
def test_each_sign_gives_alarm_at_its_bound_and_can_be_switched_off(sign, well, bad):
    assert alarms(sight(), sight(1, **{sign: well})) == {}
    found = alarms(sight(), sight(1, **{sign: bad}))
    assert found.keys() == {sign} and f"from {VALUES[sign]:.4g} to {bad:.4g}" in found[sign]
    setting = {"length": "length_ratio", "repetition": "repetition_rise",
               "distinct_2": "distinct_ratio", "entropy": "entropy_ratio"}[sign]
    assert alarms(sight(), sight(1, **{sign: bad}), **{setting: None}) == {}


@pytest.mark.parametrize("sign, words", [("kl", "policy || reference"),
                                         ("kl_start_policy", "start || policy")])
def test_kl_in_either_direction(sign, words):
    assert alarms(sight(), sight(1, **{sign: 9.0})) == {}
    assert alarms(sight(), sight(1, **{sign: 9.0}), max_kl=9.5) == {}
    found = alarms(sight(), sight(1, **{sign: 9.0}), max_kl=8.0)
    assert found == {sign: f"KL({words}) is 9 nats per response, above 8"}


def golds(*means, proxies=None, noise=0.0):
    """Evaluations of two prompts with these mean gold scores."""
    proxies = proxies or [float(i) for i in range(len(means))]
    return [sight(i, (p, p), (m - noise * (-1)**i, m + noise * (-1)**i))
            for i, (m, p) in enumerate(zip(means, proxies, strict=True))]


def test_gold_that_falls_while_the_proxy_rises():
    assert alarms(*golds(0.0, 1.0)) == alarms(*golds(0.0, 1.0, 0.96)) == {}
    found = alarms(*golds(0.0, 1.0, 0.94))["gold"]
    assert found == ("the gold score fell from 1 (iteration 1) to 0.94, 6% of its gain, while the "
                     "score that is optimised went from 1 to 2")
    assert alarms(*golds(0.0, 1.0, 0.94), gold_drop=0.1) == {}
    assert alarms(*golds(0.0, 1.0, 0.5), gold_drop=None) == {}
    # A policy that gets worse at both is no hacker of its reward.
    assert alarms(*golds(0.0, 1.0, 0.5, proxies=[0.0, 1.0, 0.9])) == {}
    # It never rose at all.
    never = alarms(*golds(0.0, -0.1))["gold"]
    assert "gold score fell from 0 (iteration 0) to -0.1, while" in never


def test_gold_that_no_longer_follows_the_proxy():
    # Half of each point of score was gold up to iteration 2; then 4 points bring 0.3 of 2.
    rising = [0.0, 0.5, 1.0, 1.1, 1.2, 1.25, 1.3]
    settings = {"stall_evaluations": 4, "gold_drop": None}
    found = alarms(*golds(*rising), **settings)
    assert found == {"gold_stall": (
        "the gold score changed by 0.3 since iteration 2, where the score that is optimised rose "
        "by 4, which had brought 2 before")}
    assert alarms(*golds(*rising), **settings, gold_stall=0.14) == {}  # a seventh of it is gained
    assert alarms(*golds(*rising), **settings, gold_stall=None) == {}
    assert alarms(*golds(*rising), stall_evaluations=6) == {}  # nothing is known before the first
    flat = [float(min(i, 2)) for i in range(7)]
    assert alarms(*golds(*rising, proxies=flat), **settings) == {}  # the proxy stalls too
    noisy = golds(*rising[:-1], noise=0.0) + golds(*rising, noise=0.4)[-1:]
    assert alarms(*noisy, **settings) == {}  # 0.3 + 2 standard errors of 0.4 are enough
    assert alarms(*noisy, **settings, num_std_errors=0.5).keys() == {"gold_stall"}


def test_a_loss_within_chance_gives_no_alarm():
    # Losses of -.14 and .26 have a mean of .06 and a standard error of .2.
    noisy = golds(0.0, 1.0, 0.94, noise=0.1)
    assert alarms(*noisy) == {}
    assert "gold" in alarms(*noisy, num_std_errors=0.25)


@pytest.mark.parametrize("values, message", [
    ({"gold_drop": 1.5}, "gold_drop: expected a share from 0 to 1"),
    ({"gold_stall": 1.0}, "gold_stall: expected a share from 0 to below 1"),
    ({"stall_evaluations": 0}, "stall_evaluations: expected at least 1"),
    ({"num_std_errors": -1}, "num_std_errors: expected a number of at least 0"),
    ({"length_ratio": 1}, "length_ratio: expected a factor above 1"),
    ({"repetition_rise": 0}, "repetition_rise: expected a share above 0"),
    ({"distinct_ratio": 1.0}, "distinct_ratio: expected a share above 0 and below 1"),
    ({"entropy_ratio": 0}, "entropy_ratio: expected a share above 0 and below 1"),
    ({"max_kl": 0}, "max_kl: expected nats above 0"),
    ({"stopp": True}, "'stopp'.*'stop'"),
])
def test_settings_of_the_watch_that_cannot_be_meant(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(WatchConfig, values, "watch")


def gold_even(rollout):
    """Some even tokens are wanted, but not all of them: highest at a share of .75."""
    return 1 - (score_even(rollout) - 0.75).abs()


def make(watch, folder=None, **settings):
    policy = tiny_model()
    settings = {**SETTINGS, "num_iterations": 40, "rollout_batch_size": 32, "minibatch_size": 16,
                "learning_rate": 1e-2, "critic_learning_rate": 3e-2, "eval_steps": 1,
                "kl_coef": 0.0, "ema_decay": None, "num_logprob_checks": 0, "num_eval_prompts": 6,
                "sampling": SamplingConfig(max_new_tokens=8, stop_token_ids=()), **settings}
    config = PPOConfig(**settings)
    run = None if folder is None else RunFolder(folder, config, stage="ppo")
    watch.folder = run
    return PPOTrainer(config, policy, copy.deepcopy(policy), tiny_critic(policy), score_even,
                      PROMPTS, eval_prompts=PROMPTS * (config.num_eval_prompts // len(PROMPTS)),
                      run=run, watch=watch)


def test_a_run_with_a_flawed_reward_is_stopped_and_reported(tmp_path, caplog):
    config = WatchConfig(stop=True, num_std_errors=0.0, entropy_ratio=None, distinct_ratio=None,
                         repetition_rise=None, gold_stall=None)
    trainer = make(RewardWatch(config, gold_even), tmp_path / "ppo")
    with caplog.at_level(logging.WARNING, "fastrl"):
        reason = trainer.train()
    assert reason.startswith("reward watch: the gold score fell from")
    assert 2 < trainer.iteration < 40
    assert "reward watch, iteration" in caplog.text and "PPO stops: reward watch" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "ppo/watch.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(trainer.iteration + 1))
    assert rows[-1]["alarms"].keys() == {"gold"} and not any(row["alarms"] for row in rows[:-1])
    best = max(row["gold"] for row in rows)
    assert rows[-1]["gold"] < best > rows[0]["gold"] and rows[-1]["proxy"] > rows[0]["proxy"]
    metrics = [json.loads(line) for line in
               (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["watch/num_alarms"] == 1 and metrics[0]["watch/num_alarms"] == 0
    assert metrics[-1]["watch/gold_mean"] == rows[-1]["gold"]
    page = write_report(tmp_path / "ppo").read_text()
    for words in ("Reward-hacking watch", "while the score that is optimised went from",
                  "gain against sqrt(KL)", "d (a - b log d)", "KL(start || policy)"):
        assert words in page


def gold_up_to_three_quarters(rollout):
    """Even tokens are wanted up to a share of three quarters; each one more does harm."""
    share = score_even(rollout)
    return share - 3 * (share - 0.75).clamp_min(0)


@pytest.mark.slow  # seconds, since a tenth of a gain is seen on a thousand responses only
def test_the_alarm_comes_before_a_tenth_of_the_gold_scores_gain_is_lost(tmp_path):
    config = WatchConfig(stop=True, stall_evaluations=3, entropy_ratio=None, distinct_ratio=None)
    trainer = make(RewardWatch(config, gold_up_to_three_quarters), tmp_path / "ppo",
                   rollout_batch_size=64, minibatch_size=64, learning_rate=3e-3, eval_steps=2,
                   critic_learning_rate=1e-2, num_eval_prompts=960, keep_best=False,
                   engine=EngineConfig(page_size=4, max_batch_size=64))
    assert "since iteration" in trainer.train()
    stopped = trainer.iteration
    while trainer.iteration < 22:  # what would have come without the stop
        trainer.step()
    rows = [json.loads(line) for line in (tmp_path / "ppo/watch.jsonl").read_text().splitlines()]
    golds = {row["step"]: row["gold"] for row in rows}
    at_stop, start = golds[stopped], golds[0]
    peak = max(golds.values())
    assert at_stop > start + 0.9 * (peak - start) and golds[stopped // 2 // 2 * 2] < at_stop
    assert golds[22] < start + 0.6 * (peak - start)  # risen and fallen
    proxies = [row["proxy"] for row in rows]
    assert proxies[2:] == sorted(proxies[2:])  # while the proxy keeps rising
    assert not any(row["alarms"] for row in rows if row["step"] < stopped)


def test_without_stop_the_run_goes_on_and_says_an_alarm_once(caplog):
    config = WatchConfig(max_kl=1e-6, num_std_errors=1e9, length_ratio=None)
    trainer = make(RewardWatch(config, gold_even), num_iterations=3)
    with caplog.at_level(logging.WARNING, "fastrl"):
        assert trainer.train() == "all 3 iterations done"
    assert caplog.text.count("KL(start || policy)") == 1


def test_kl_from_the_start_is_measured_on_the_starts_own_samples():
    trainer = make(RewardWatch(WatchConfig()), num_iterations=2, keep_best=False)
    start = copy.deepcopy(trainer.policy)
    first = trainer.evaluate()
    assert first["watch/kl_start_policy"] == 0 and "watch/gold_mean" not in first
    trainer.iteration = 1  # evaluated by hand above
    metrics = trainer.step()
    prompts, sampling = [p.token_ids for p in PROMPTS], trainer.config.sampling
    samples = generate_for(start, prompts, sampling, seed=derive_seed(0, "eval"))
    kl = sum(response_logprobs(model, samples, 1.0, 1000)[0].double().sum() * sign
             for model, sign in ((start, 1), (trainer.policy, -1))) / len(prompts)
    assert metrics["watch/kl_start_policy"] == pytest.approx(float(kl), abs=1e-4)
    assert metrics["watch/kl_start_policy"] > 0


def test_a_gold_score_that_is_not_finite_stops_the_run():
    trainer = make(RewardWatch(WatchConfig(), lambda rollout: score_even(rollout) / 0))
    with pytest.raises(NumericsError, match="finite gold_scores"):
        trainer.evaluate()

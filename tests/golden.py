"""Hand-checkable numbers of the specification (section 13), as literals.

Tests read them through the fixture `golden`; nothing here may be computed by fastrl.
"""

# Ranking loss: one prompt, scores best to worst, K = 4.
RANKING_SCORES = (1.0, 0.5, 0.0, -1.0)
RANKING_LOSS = 0.3171698
RANKING_GRADIENT = (-0.127614, -0.030404, 0.062923, 0.095095)
RANKING_TIE_RANKS = (0, 1, 1, 2)
RANKING_TIE_LOSS_KEPT_PAIRS = 0.2857883
RANKING_TIE_LOSS_ALL_PAIRS = 0.2381569

# Shaped reward of one response of three tokens.
SHAPING_LOGPROBS = (-1.0, -2.0, -0.5)
SHAPING_REF_LOGPROBS = (-1.2, -1.9, -0.9)
SHAPING_KL_COEF = 0.02
SHAPING_SCORE = 0.7
SHAPING_REWARDS = (-0.004, 0.002, 0.692)
SHAPING_K1 = (0.2, -0.1, 0.4)
SHAPING_K2 = (0.02, 0.005, 0.08)
SHAPING_K3 = (0.01873075, 0.00517092, 0.07032005)

# Generalised advantage estimation, gamma 1.
GAE_REWARDS = (-0.01, 0.02, -0.03, 1.0)
GAE_VALUES = (0.1, 0.2, 0.3, 0.4)
GAE_ADVANTAGES = {
    0.95: (0.7816, 0.728, 0.64, 0.6),
    1.0: (0.88, 0.79, 0.67, 0.6),
    0.0: (0.09, 0.12, 0.07, 0.6),
}
GAE_RETURNS_095 = (0.8816, 0.928, 0.94, 1.0)
GAE_WHITENED_095 = (1.318819, 0.568408, -0.66361, -1.223618)

# Whitening with the mean kept.
WHITEN_VALUES = ((1.2, 1.3, 1.4), (1.5, 1.6, 1.7), (1.8, 1.9, 2.0))
WHITEN_KEEP_MEAN_FIRST_ROW = (0.0508, 0.4381, 0.8254)

# Clipped policy loss, clip range 0.2: (ratio, advantage, loss).
POLICY_LOSSES = ((1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8))

# Clipped value loss, clip range 0.2: (value, old value, return, loss).
VALUE_LOSSES = ((1.0, 0.5, 2.0, 0.845), (1.0, 0.5, 0.0, 0.5), (0.6, 0.5, 2.0, 0.98))

# Adaptive KL coefficient after one batch of 512 episodes: KL -> coefficient.
ADAPTIVE_KL_COEF = 0.15
ADAPTIVE_KL_TARGET = 6.0
ADAPTIVE_KL_HORIZON = 10_000
ADAPTIVE_KL_EPISODES = 512
ADAPTIVE_KL_RESULTS = {12.0: 0.151536, 6.6: 0.150768, 5.0: 0.14872, 0.0: 0.148464}

# Group baselines of four scores.
GROUP_SCORES = (1.0, 0.0, 0.5, -0.5)
GRPO_POPULATION_STD = (1.341641, -0.447214, 0.447214, -1.341641)
GRPO_SAMPLE_STD = (1.161895, -0.387298, 0.387298, -1.161895)
RLOO = (1.0, -1 / 3, 1 / 3, -1.0)

# Direct preference optimisation of one pair (chosen, rejected).
DPO_BETA = 0.1
DPO_LOGPROBS = (-10.0, -12.0)
DPO_REF_LOGPROBS = (-11.0, -11.5)
DPO_MARGIN = 0.15
DPO_LOSS = 0.620957

# KL of best-of-n sampling: n -> nats.
BEST_OF_N_KL = {4: 0.63629, 16: 1.83509, 64: 3.17451}

# Cosine schedule to 10%: share of the run -> share of the peak.
COSINE_TO_TENTH = {0.25: 0.868198, 0.5: 0.55, 0.75: 0.231802}

# Entropy in bits of a pair of probabilities (p, 1 - p): p -> bits.
ENTROPY_BITS = {0.5: 1.0, 0.9: 0.468996}

# Win probability of one unit of preference-model score.
SIGMOID_ONE = 0.731059

"""The paper's mathematics: schedules, programs, guidance and the sampler; numpy alone."""

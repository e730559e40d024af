"""topk_attention of csrc/cuda on the simulated GPU: special values through selection and attention together."""

from __future__ import annotations

import pytest
import torch
from ops.test_special_values import (  # noqa: F401
    test_a_score_of_plus_infinity,
    test_constant_rows,
    test_every_kind_of_nan,
    test_forced_keys_leave_no_slot_for_a_nan,
    test_hidden_keys_do_not_leak,
    test_infinities_among_heads_that_share,
    test_nan_in_a_key,
    test_nan_in_a_query,
    test_negative_zero_ties_with_zero,
    test_queries_of_zero,
    test_rows_that_see_nothing,
    test_rows_that_see_some_nothing_and_one,
    test_scores_of_minus_infinity,
    test_special_values_in_a_value,
)

from simt.wing import SimulatedWing

pytestmark = pytest.mark.slow
WINGS = [
    SimulatedWing(dtypes=(torch.float32, torch.bfloat16))
]  # the half types differ in their conversions alone

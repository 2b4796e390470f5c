"""Savings, strategies, splits, offload, and all of them in one plan."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

import kvcore
from kvcore.planner import compare, get_device, get_model, offload, plan, recompute, splits


class TestRecompute:
    def test_a_gpt_2_layer_by_hand(self):
        """1,024 + 100 tokens through one layer of width 768."""
        found = recompute(get_model("gpt2"), 1024, 100, layers=1)
        last, fed = 1123, sum(range(1024, 1124))
        assert (found.cached_tokens, found.uncached_tokens) == (last, fed)
        projections, mlp = 4 * 768 * 768 + 4 * 768, 2 * 768 * 3072 + 3072 + 768
        assert found.cached.projections == 2 * last * projections
        assert found.uncached.mlp == 2 * fed * mlp
        assert found.cached.scores == 4 * 768 * last * (last + 1) // 2
        assert found.uncached.scores == sum(4 * 768 * n * (n + 1) // 2 for n in range(1024, 1124))
        assert found.cached.head == found.uncached.head == 0

    def test_the_factor_depends_on_what_is_counted(self):
        found = recompute(get_model("gpt2"), 1024, 100, layers=1)
        assert 90 < found.factor < 100
        assert found.factor_after_prompt == pytest.approx(1074)
        assert recompute(get_model("gpt2"), 1024, 100).factor < found.factor

    def test_one_token_needs_no_cache(self):
        found = recompute(get_model("llama-3-8b"), 100, 1)
        assert found.cached == found.uncached
        assert found.factor == 1

    def test_experts_that_a_token_does_not_take_do_not_count(self):
        found = recompute(get_model("mixtral-8x7b"), 10, 1)
        model = get_model("mixtral-8x7b")
        parts = found.cached.projections + found.cached.mlp + found.cached.head
        norms = model.num_layers * model.norm_parameters + 4096
        assert parts == pytest.approx(
            2 * 10 * (model.active_parameters - norms) - 2 * 9 * 32000 * 4096
        )


class TestStrategies:
    def table(self, name, *args, **options):
        return {row.name: row for row in compare(get_model(name), *args, **options)}

    def test_heads(self):
        table = self.table("llama-3-8b", 8192)
        assert table["as it is"].ratio == 1
        assert table["MHA, 32 KV heads"].ratio == 1 / 4
        assert table["MQA, 1 KV head"].ratio == 8
        assert table["MLA, latent of 512 + 64"].ratio == pytest.approx(2048 / 576)

    def test_a_latent_beside_heads(self):
        table = self.table("deepseek-v3", 8192)
        assert table["MHA, 128 KV heads"].ratio == pytest.approx(576 / (2 * 128 * 192))
        assert not any(name.startswith("rot8") for name in table)

    def test_formats_shrink_by_their_bits(self):
        table = self.table("llama-3-8b", 65536)
        assert table["rot8/rot8"].ratio == pytest.approx(16 / 8.125, rel=0.01)
        assert table["chan4/rot4"].ratio == pytest.approx(16 / 4.5625, rel=0.02)

    def test_formats_that_no_head_fits_are_left_out(self):
        assert "rot6/rot6" not in self.table("phi-3-mini", 4096)
        assert "rot8/rot8" in self.table("phi-3-mini", 4096)

    def test_sharing_and_paging(self):
        table = self.table("llama-2-7b", 2048, 4, shared=1024)
        assert table["prefix of 1024 shared"].ratio == pytest.approx(8192 / (8192 - 3 * 1024))
        assert table["contiguous, 4096 each"].ratio == 1 / 2

    def test_windows(self):
        table = self.table("llama-2-7b", 32768, window=4096)
        assert table["window 4096 in all layers"].ratio == pytest.approx(32768 / (4096 + 64))
        sinks = table["window 4096 and a block of sinks"]
        assert sinks.nbytes - table["window 4096 in all layers"].nbytes == 64 * 524_288

    def test_means_together_save_more_than_alone(self):
        table = self.table("llama-3-8b", 32768, 8)
        both = table["rot8/rot8, prefix of 16384 shared"].ratio
        assert both > max(table["rot8/rot8"].ratio, table["prefix of 16384 shared"].ratio)


class TestSplits:
    def of(self, name, num_devices, length=8192, batch=8):
        model = get_model(name)
        found = splits(model, model.cache_spec(), length, batch, num_devices)
        return model, {split.kind: split for split in found}

    def test_tensor(self):
        model, found = self.of("llama-3-8b", 4)
        kv = 8 * 8192 * 131_072
        assert found["tensor"].kv_nbytes == kv // 4
        assert found["tensor"].weight_nbytes == -(-model.weight_nbytes // 4)
        assert found["tensor"].wire_nbytes == 2 * 3 * (2 * 32 * 8 * 4096 * 2) // 4
        assert found["tensor"].replicas == 1

    def test_more_devices_than_heads_store_them_twice(self):
        _, found = self.of("llama-3-8b", 16)
        assert found["tensor"].kv_nbytes == 8 * 8192 * 131_072 // 8
        assert found["tensor"].replicas == 2
        _, found = self.of("deepseek-v3", 8)
        assert found["tensor"].kv_nbytes == 8 * 8192 * 70_272

    def test_pipeline(self):
        _, found = self.of("llama-3-8b", 4)
        assert found["pipeline"].kv_nbytes == 8 * 8192 * 131_072 // 4
        assert found["pipeline"].wire_nbytes == 8 * 4096 * 2

    def test_context(self):
        model, found = self.of("llama-3-8b", 4)
        assert found["context"].kv_nbytes == 8 * 8192 * 131_072 // 4
        assert found["context"].weight_nbytes == model.weight_nbytes
        each = 8 * 32 * (128 * 2 + 129 * 4)
        assert found["context"].wire_nbytes == 32 * each * 3 // 4

    def test_experts(self):
        model, found = self.of("mixtral-8x7b", 8)
        assert found["expert"].kv_nbytes == 8192 * 131_072
        gone = 7 * 32 * 3 * 4096 * 14336
        assert found["expert"].weight_nbytes == 2 * (model.parameters - gone)
        assert found["expert"].wire_nbytes == 2 * 32 * (2 * 4096 * 2) * 7 // 8
        assert "expert" not in self.of("llama-3-8b", 8)[1]

    def test_one_device_sends_nothing(self):
        _, found = self.of("mixtral-8x7b", 1)
        assert {split.wire_nbytes for split in found.values()} == {0}
        assert found["tensor"].wire_seconds(1e9) == 0

    def test_layers_cannot_be_split_further(self):
        assert "pipeline" not in self.of("gpt2", 13)[1]


def test_offload_by_hand():
    model, device = get_model("llama-2-7b"), get_device("h100")
    found = offload(model, device, model.cache_spec("fp16"), 8192)
    assert found.nbytes == 8192 * 524_288
    assert found.fetch_seconds == found.nbytes / 64e9
    products = 2 * 8192 * (model.active_parameters - 32000 * 4096) / 989.4e12
    assert found.recompute_seconds > products
    assert found.gain == found.recompute_seconds / found.fetch_seconds


class TestPlan:
    def test_has_every_answer(self):
        found = plan("llama-3-8b", "h100", 16, 32768, "int8", num_devices=2)
        assert found.fits
        assert found.memory.kv <= found.room
        assert found.longest_context >= 32768
        assert found.most_sequences >= 16
        assert found.growth.batches == (1, 16)
        assert found.growth.lengths[-1] == 65536
        assert {split.kind for split in found.splits} == {"tensor", "pipeline", "context"}
        assert found.recompute.prompt + found.recompute.generated == 32768

    def test_says_when_it_does_not_fit(self):
        found = plan("llama-2-13b", "rtx-4090")
        assert (found.fits, found.room, found.longest_context) == (False, 0, 0)

    def test_takes_its_own_models_and_devices(self):
        model = replace(get_model("gpt2"), name="mine")
        found = plan(model, replace(get_device("h100"), name="here"), context=10)
        assert (found.model.name, found.device.name, found.splits) == ("mine", "here", ())

    def test_is_frozen(self):
        with pytest.raises(FrozenInstanceError):
            plan("gpt2", "h100").batch = 2

    @pytest.mark.parametrize(
        ("argument", "value"), [("batch", 0), ("context", 0), ("chunk", 0), ("num_devices", 0)]
    )
    def test_numbers_below_one(self, argument, value):
        with pytest.raises(kvcore.InvalidArgument, match=f"^{argument}: expected at least 1"):
            plan("gpt2", "h100", **{argument: value})

    def test_formats_that_do_not_fit_the_model(self):
        with pytest.raises(kvcore.InvalidArgument, match="k_format"):
            plan("gpt2", "h100", k_format="int5")
        with pytest.raises(kvcore.InvalidArgument, match="v_format"):
            plan("gpt2", "h100", k_format="chan4", v_format="chan4")

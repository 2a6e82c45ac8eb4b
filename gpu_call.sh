export PYTHONPATH=src PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
timeout 220 python3 -m pytest tests/engine/test_gpu.py -q -p no:cacheprovider --maxfail=25 --tb=short -rA 2>&1 | grep -v "^PASSED\|Warning\|WARNING" | tail -150 | cut -c1-300 | tee $OUT/tests.log | tail -70
timeout 100 python3 -m benchmarks.serving --profile --only 7b-8k-4 --steps 20 2>&1 | tail -14
timeout 60 python3 scripts/one_answer.py --device cuda --dtype bfloat16 2>&1 | tail -3

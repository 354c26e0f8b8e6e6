# make demo      make twelve edits with the shipped weights -> out/demo.png
# make app       open a page in the browser on which to edit pictures
# make dataset   make captions, pairs of pictures and a contact sheet, in the nano world -> data/nano
# make train     train an editor from the nano text-to-image model, or resume this run -> runs/first
# make test      run the whole test suite, on two cores
# make test-fast compare the core with diffusers and transformers at small widths; less than a minute
# make docs      draw every picture of README.md and docs/ again; an hour on one core
# make reproduce repeat the paper in the nano world: weights, data, scores, figure 8, ablations -> runs
# make reproduce-small  the same with far fewer steps, in two hours -> runs/small
# make fuzz      100,000 mutated inputs for everything that reads files; an hour on one core
# make bench     run all benchmarks for a CPU, with 13 GB of disk; tests/benchmarks/RESULTS.md has results
# make bench-gpu run the benchmarks that need a GPU, for the figures that RESULTS.md calls "not measured"
# make lint      run ruff
# Each target first sets up .venv, if it is missing or older than pyproject.toml or constraints.txt.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo app dataset train docs reproduce reproduce-small test test-fast fuzz bench bench-gpu lint

demo: .venv/runtime
	.venv/bin/python weights/demo.py --out out/demo.png

app: .venv/app
	.venv/bin/python -m nanoip2p.app

dataset: .venv/runtime
	.venv/bin/python make_dataset.py captions --backend scenes --n 24 --out data/nano/prompts.jsonl
	.venv/bin/python make_dataset.py pairs --prompts data/nano/prompts.jsonl --out data/nano/pairs \
		--weights weights/nano-sd --dtype fp32
	.venv/bin/python make_dataset.py show data/nano/pairs --rows 3

train: .venv/runtime
	if [ -d runs/first/checkpoints ]; then .venv/bin/python train.py --resume runs/first; else \
		.venv/bin/python train.py --preset nano --weights weights/nano-sd --data scenes --out runs/first; fi

docs: .venv/browser dataset train
	.venv/bin/python weights/screenshot.py --out weights/page.png
	.venv/bin/python weights/demo.py --out weights/nano-ip2p/demo.png
	.venv/bin/python sample.py --weights weights/nano-ip2p-paper --input weights/nano-ip2p/examples/rocket.png \
		--edit "make it sunset" --seed 0 --sweep --output weights/sweep.webp
	.venv/bin/python sample.py --input weights/nano-ip2p/examples/house.png --edit "make it night" \
		--edit "turn the house blue" --mask auto --show-mask --grid --seed 0 --output weights/masks.png
	.venv/bin/python make_dataset.py pair "a red house in the middle, on grass, clear day" \
		"a blue tree in the middle, on grass, clear day" --dtype fp32 --heatmaps --out weights/nano-sd/heatmaps.png
	.venv/bin/python -m nanoip2p.evaluate curve --weights weights/nano-ip2p-paper --sdedit weights/nano-sd \
		--n 150 --out runs/curve
	.venv/bin/python -m nanoip2p.evaluate curve --n 150 --out runs/curve
	.venv/bin/python weights/four_steps.py --out runs/nano-ip2p-4step
	.venv/bin/python -m nanoip2p.evaluate calls --weights weights/nano-ip2p runs/nano-ip2p-4step \
		--n 140 --out runs/calls
	.venv/bin/python weights/round_trip.py --n 512 --out weights/round-trip.webp
	cp runs/calls/calls.png runs/calls/calls.jsonl weights/
	cp data/nano/pairs/contact-sheet.png weights/nano-sd/pairs.png
	cp runs/first/samples-000600.png weights/first-editor.png
	cp runs/first/loss.png weights/first-editor-loss.png
	cp runs/curve/curve.png runs/curve/curve.jsonl weights/

RUNS = runs
N = 490
CURVE_N = 150
reproduce: .venv/test
	.venv/bin/python weights/make_nano.py --out $(RUNS)/nano $(NANO)
	.venv/bin/python -m nanoip2p.evaluate captions --weights $(RUNS)/nano/ship/nano-sd \
		--clip $(RUNS)/nano/ship/nano-clip
	for editor in nano-ip2p nano-ip2p-paper; do for combinations in seen held-out; do \
		.venv/bin/python -m nanoip2p.evaluate scenes --weights $(RUNS)/nano/ship/$$editor \
			--combinations $$combinations --n $(N) --out $(RUNS)/scores/$$editor-$$combinations || exit; \
		done; done
	.venv/bin/python -m nanoip2p.evaluate curve --weights $(RUNS)/nano/ship/nano-ip2p-paper \
		--sdedit $(RUNS)/nano/ship/nano-sd --clip $(RUNS)/nano/ship/nano-clip --n $(CURVE_N) \
		--out $(RUNS)/curve-paper
	.venv/bin/python weights/ablate.py --out $(RUNS)/ablate $(ABLATE)

# With 1% to 25% of the steps and prompts; CLIP has 63%, because a weak CLIP lets no pair pass
reproduce-small:
	$(MAKE) reproduce RUNS=runs/small N=140 CURVE_N=35 \
		NANO="--clip-steps 500 --wording-steps 800 --vae-steps 800 --decoder-steps 400 --sd-steps 1200 300 \
			--captions 6000 --prompts 60 --local-prompts 60 --new-prompts 40 --pairs 4000 \
			--paper-steps 500 --editor-steps 400 300 --distill-steps 60" \
		ABLATE="--prompts 100 --steps 40 --seeds 1 --n 70 --only 'baseline' 'a tenth of the data' \
			'not from nano-sd' 'picture never dropped' 'rendered pairs'"

# Small networks are faster on one thread
test test-fast fuzz bench: export OMP_NUM_THREADS = 1

test: .venv/test
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-fast: .venv/test
	.venv/bin/python -m pytest tests/parity -m "not full"

fuzz: .venv/test
	ulimit -v 16000000; .venv/bin/python tests/fuzz/fuzz.py --n 100000 --seed 1

bench: .venv/test
	.venv/bin/python tests/benchmarks/startup.py --repeat 5
	.venv/bin/python tests/benchmarks/edit.py --width full --repeat 5
	.venv/bin/python tests/benchmarks/edit.py --width full --repeat 3 --dtype bf16
	.venv/bin/python tests/benchmarks/edit.py --width half --repeat 3
	.venv/bin/python tests/benchmarks/edit.py --width half --repeat 3 --dtype bf16
	.venv/bin/python tests/benchmarks/edit.py --width full --steps 20 --repeat 1 --deep-every 3
	.venv/bin/python tests/benchmarks/patches.py
	.venv/bin/python tests/benchmarks/patches.py --dtype bf16
	.venv/bin/python tests/benchmarks/resident.py
	.venv/bin/python tests/benchmarks/autoencoder.py
	.venv/bin/python tests/benchmarks/batch.py --repeat 9
	.venv/bin/python tests/benchmarks/few_steps.py --batches 1 35 --deep-every 2 3 4 5
	.venv/bin/python tests/benchmarks/pair.py --width tiny --steps 1 --repeat 3
	.venv/bin/python tests/benchmarks/train_step.py --repeat 3
	.venv/bin/python tests/benchmarks/train_step.py --width half --batch 4 --repeat 2
	.venv/bin/python tests/benchmarks/train_step.py --width half --batch 1 --repeat 3
	.venv/bin/python tests/benchmarks/train_step.py --width half --batch 4 --repeat 3 \
		--sides "ours, stored" "LoRA 16" "LoRA 64 all"
	.venv/bin/python tests/benchmarks/attention.py --repeat 5
	.venv/bin/python tests/benchmarks/edit_memory.py
	.venv/bin/python tests/benchmarks/memory.py
	.venv/bin/python tests/benchmarks/load.py --repeat 3

bench-gpu: .venv/test
	.venv/bin/python tests/benchmarks/attention.py --batch 3
	.venv/bin/python tests/benchmarks/attention.py --batch 6
	.venv/bin/python tests/benchmarks/edit.py --width full --latents 64 --steps 100 --dtype bf16
	.venv/bin/python tests/benchmarks/pair.py --width full --latents 64
	.venv/bin/python tests/benchmarks/train_step.py --width full --batch 32 --steps 10
	.venv/bin/python tests/benchmarks/train_step.py --width full --batch 32 --steps 10 --compile

lint: .venv/test
	.venv/bin/ruff check

# Several stamp files, because a demo needs neither diffusers nor gradio
.venv/runtime: pyproject.toml constraints.txt
	@echo "Setting up .venv (some minutes, mostly for torch)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[plots]'
	@touch $@

.venv/test: .venv/runtime
	$(PIP) --editable '.[test,plots]'
	@touch $@

.venv/app: .venv/runtime
	$(PIP) --editable '.[app]'
	@touch $@

.venv/browser: .venv/test
	$(PIP) --editable '.[test,plots,browser]'
	@touch $@

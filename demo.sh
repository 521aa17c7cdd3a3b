#!/usr/bin/env bash
# The whole job in minutes on a laptop CPU: a small RWKV learns to prefer warm answers to grumpy ones.
#   ./demo.sh [--version 5|6|7, default 5] [folder for the results, default demo_out]
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
version=5
if [[ ${1:-} == --version ]]; then
    version=${2:-}
    [[ $version =~ ^[567]$ ]] || { echo "demo.sh --version $version: 5, 6 and 7 are accepted" >&2; exit 2; }
    shift 2
fi
out=${1:-$root/demo_out}
source "$root/setup.sh"
mkdir -p "$out"
# Threads that spin while they wait are a little faster alone, and thirty times slower when another program wants the cores.
export OMP_WAIT_POLICY=passive

corpus=(--data_file "$root/default_text_document" --data_type binidx --vocab_size 65536 --ctx_len 256)
run=(--accelerator cpu --precision fp32 --random_seed 1 --overwrite 1 --epoch_save 0)

step "1/4 Train a small RWKV-$version from scratch on default_text_document"
python "$root/RWKV-v5/train.py" --dpo 0 "${corpus[@]}" "${run[@]}" --proj_dir "$out/base" --rwkv_version "$version" --n_layer 4 \
    --n_embd 128 --micro_bsz 4 --epoch_steps 60 --epoch_count 5 --lr_init 3e-3 --lr_final 3e-4 --warmup_steps 20

step "2/4 Build preference pairs, scored by that model"
python "$root/RWKV-v5/prepare_pairs.py" --source "$root/RWKV-v5/demo/preferences.jsonl" --load_model "$out/base/rwkv-final.pth" \
    --out_dir "$out/pairs" --overwrite 1 --templates chat --ctx_len 256 --valid_ratio 0.1 --test_ratio 0.2 --device cpu

step "3/4 Direct Preference Optimization, with the corpus mixed in"
python "$root/RWKV-v5/train.py" --load_model "$out/base/rwkv-final.pth" "${corpus[@]}" "${run[@]}" --proj_dir "$out/dpo" \
    --dpo 1 --dpo_train_file "$out/pairs/trainset.save" --dpo_valid_file "$out/pairs/validset.save" \
    --dpo_beta 0.1 --dpo_general_corpus_ratio 0.8 --micro_bsz 4 --epoch_steps 84 --epoch_count 2 --lr_init 2.5e-4 --lr_final 5e-5 --warmup_steps 10 \
    --eval_every 21 --sample_prompts "$root/RWKV-v5/demo/prompts.txt" --sample_tokens 40

step "4/4 Before and after, on prompts that neither run has seen"
python "$root/RWKV-v5/evaluate.py" --load_model "$out/base/rwkv-final.pth" "$out/dpo/rwkv-final.pth" --pairs "$out/pairs/testset.save" \
    --data_file "$root/default_text_document" --ctx_len 256 --max_tokens 40 --temperature 0 --device cpu --out "$out/report.json" \
    --prompt "What does a horse eat?" "Where does a badger sleep?" "What is a cradle made of?"

printf '\n%s shows the curves of the run and its answers\n' "$out/dpo/report.html"

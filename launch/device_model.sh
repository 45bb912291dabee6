#!/usr/bin/env bash
# Makes a small emotion model from EMO-DB and nEMO, with the five classes that both have: a log-mel
# student that needs no encoder, taught by a teacher on Whisper-base's features. Two speakers of
# each corpus are held out and scored. Call it in the repository's folder:
#
#   launch/device_model.sh EMODB NEMO/manifest.csv OUT
#
# EMODB is the folder that holds wav; nEMO's manifest has the columns path, label and speaker. The
# model is OUT/emotions. WHISPER=FOLDER uses a local copy of Whisper-base. A command that was
# stopped continues when it is started again.
set -euo pipefail
if [ $# != 3 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 64
fi
out=$3 whisper=${WHISPER:-openai/whisper-base}
python -m benchmarks.joined --emodb="$1" --nemo="$2" --out="$out/data"
python -m serkd_jax.pretrain --model="$whisper" --layer=2 --input="$out/data/train.csv" \
  --out="$out/pretrained" --epochs=26
python -m serkd_jax.main --config=configs/manifest.py:device \
  --config.manifest="$out/data/all.csv" --config.protocol.split_by=split \
  --config.max_frames=150 --config.teacher.frontend.model="$whisper" \
  --config.student.pretrained="$out/pretrained" --workdir="$out/run"
python -m serkd_jax.export --workdir="$out/run" --out="$out/emotions" --format=all \
  --name=serkd-emotions --data="EMO-DB (German) and nEMO (Polish)" --license=cc-by-nc-sa-4.0 \
  --terms="nEMO is CC BY-NC-SA 4.0, so name nEMO and its authors, use the weights for no \
commercial purpose, and pass them on only under the same licence. EMO-DB is free of charge for \
research. The student learned from hidden states of Whisper-base, which is MIT."

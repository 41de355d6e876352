#!/usr/bin/env bash
# The five projects' recipes on real data, small: teachers made here, controls on labels alone, students. What is there
# already is not made again. Some three hours on two cores.
#
#   benchmarks/recipes/trial.sh DATA FOLDER TOKENIZER [encoder ner wnut sst phrases squad bert ablations ...]
#
# DATA holds the unpacked data sets that prepare.py names, TOKENIZER is BERT's uncased one. Figures: docs/results.md.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,8p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
data=$(realpath "$1") tokenizer=$(realpath "$3")
mkdir -p "$2" && cd "$2"
shift 3
[ $# -gt 0 ] || set -- encoder ner wnut sst phrases squad bert ablations

build() { # TASK TOKENS INPUT OUTPUT [option ...]
  local task=$1 tokens=$2 input=$3 output=$4
  shift 4
  python "$root/data_tools/build_shards.py" --task "$task" --sequence-tokens "$tokens" --tokenizer "$tokenizer" \
    --input "$input" --output "$output" "$@"
}
train() { # RECIPE [key=value ...]
  local recipe=$1
  shift
  python "$root/launch/distill.py" --config "$here/$recipe.yaml" "$@"
}
labelled() { # NAME: data of a labelled task
  echo "data.manifest=$1/manifest.json evaluation.manifest=$1-dev/manifest.json evaluation.test_manifest=$1-test/manifest.json"
}

encoder() {
  cp -rn "$tokenizer" tok
  python "$root/data_tools/build_shards.py" --task masked_lm --one-per-line --sequence-tokens 128 --tokenizer tok \
    --input text/wiki.txt text/conll.txt text/sst.txt text/squad.txt --output mlm --split-heldout 0.02 --shard-bytes 4MB
  train encoder
}
entities() { # NAME TRAIN DEV TEST EPOCHS-OF-THE-TEACHER STEPS-OF-THE-CONTROL LAST-LEARNING-RATE
  build token_classification 128 "$2" "$1"
  build token_classification 128 "$3" "$1-dev" --labels "$1/manifest.json"
  build token_classification 128 "$4" "$1-test" --labels "$1/manifest.json"
  build token_classification 128 "text/$1-transfer.tsv" "$1-transfer" --labels "$1/manifest.json"
  # shellcheck disable=SC2046
  train labels run.name="$1-teacher" run.num_epochs="$5" $(labelled "$1")
  # shellcheck disable=SC2046
  train control run.name="$1-control" run.num_steps="$6" teacher.model="runs/$1-teacher/export" $(labelled "$1")
  train staged run.name="$1-student" teacher.model="runs/$1-teacher/export" data.manifest="$1-transfer/manifest.json" \
    stages.3.data.manifest="$1/manifest.json" stages.3.optimizer.learning_rate="$7" evaluation.manifest="$1-dev/manifest.json" \
    evaluation.test_manifest="$1-test/manifest.json" evaluation.control="runs/$1-control/export"
}
ner() {
  local folder=$data/conll2003-en/bio2
  entities ner "$folder/train.txt" "$folder/valid.txt" "$folder/test.txt" 5 2892 5.0e-4
}
wnut() {
  local folder=$data/wnut17
  entities wnut "$folder/wnut17train.conll" "$folder/emerging.dev.conll" "$folder/emerging.test.annotated" 8 1625 1.0e-4
}
sst() {
  local folder=$data/sst2-glue/sst2-sentences
  build sequence_classification 64 "$folder/train.tsv" sst --columns text,label
  build sequence_classification 64 "$folder/dev.tsv" sst-dev --columns text,label --labels sst/manifest.json
  build sequence_classification 64 "$folder/test.tsv" sst-test --columns text,label --labels sst/manifest.json
  build sequence_classification 64 text/sst-phrases.tsv sst-transfer --columns text,label --labels sst/manifest.json --unlabelled
  # shellcheck disable=SC2046
  train labels run.name=sst-teacher task.kind=sequence_classification $(labelled sst)
  # shellcheck disable=SC2046
  train control run.name=sst-control run.num_steps=1701 task.kind=sequence_classification \
    teacher.model=runs/sst-teacher/export $(labelled sst)
  train sentences evaluation.control=runs/sst-control/export
}
phrases() { # after sst, whose dev and test data it takes
  build sequence_classification 64 text/sst-phrases.tsv phrases --columns text,label --labels sst/manifest.json
  train labels run.name=phrases-teacher task.kind=sequence_classification data.manifest=phrases/manifest.json \
    run.num_epochs=1 data.lanes=64 batch.global_sequences=64 batch.micro_sequences=64 evaluation.every_steps=300 \
    evaluation.manifest=sst-dev/manifest.json evaluation.test_manifest=sst-test/manifest.json
  train phrases run.name=phrases-control 'losses=[{kind: cross_entropy}]'
  train phrases evaluation.control=runs/phrases-control/export
}
squad() {
  build question_answering 256 "$data/squad1-train-slice/squad1-train-slice.json" squad --overlap-tokens 64 \
    --question-tokens 40 --split-heldout 0.2
  train labels run.name=squad-teacher run.num_epochs=3 task.kind=question_answering data.manifest=squad/manifest.json \
    evaluation.manifest=squad/heldout/manifest.json evaluation.test_manifest=null early_stop=null \
    evaluation.every_steps=null
  train questions run.name=squad-control 'losses=[{kind: cross_entropy}]'
  train questions evaluation.control=runs/squad-control/export
}
bert() {
  python "$root/data_tools/build_shards.py" --task masked_lm --one-per-line --sequence-tokens 32 --tokenizer wordpieces \
    --input text/stories.txt --output stories --split-heldout 0.1 --shard-bytes 256KB
  train teacher_bert
  train bert run.name=bert-control 'losses=[{kind: cross_entropy}]'
  train bert evaluation.control=runs/bert-control/export
}
ablations() {
  python "$root/benchmarks/ablations.py" --masked "$here/bert.yaml" --staged "$here/staged.yaml" \
    --output-folder ablations --output ablations.json
}

[ -d text ] || python "$here/prepare.py" "$data" .
for part; do "$part"; done

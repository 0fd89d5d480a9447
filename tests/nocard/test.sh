#!/bin/bash
# Run the CUDA tests of a virtual environment: on this machine's card, or else on cards
# that are not there, without the tests of values and times.
cd "$(dirname "$0")/../.."
python=$1/bin/python
tests="-p no:cacheprovider tests/test_cuda.py tests/allocator tests/nocard"
pictures=tests/cases/test_pictures.py  # torchvision loads beside this build alone
$python -m pytest -p no:cacheprovider $pictures || exit 1
if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  exec $python -m pytest $tests
fi
tests/nocard/build.sh "$1" || exit 1
failed=0
# Notebooks take a core of their own, meanwhile; a card's branches are every card's.
notebooks=tests/nocard/test_notebooks.py
log=$(mktemp)
NOCARD=H100 tests/nocard/run.sh $python -m pytest -p no:cacheprovider --tb=native \
  --assert=plain $notebooks >"$log" 2>&1 &
for card in ${CARDS:-H100 A100 T4}; do
  echo "== $card, which is not there (tests/nocard)"
  # A tensor that is printed, as in a failed assertion, may hold anything.
  NOCARD=$card tests/nocard/run.sh $python -m pytest -m "not arithmetic" \
    --tb=native --assert=plain --ignore=$notebooks $tests || failed=1
done
wait $! || failed=1
echo "== the notebooks, on an H100 that is not there"
cat "$log"
rm "$log"
exit $failed

#!/bin/sh
# Asks, and prints the answer as it comes. Needs curl and jq. Ctrl-C stops the answer.

url=${CHAT_URL:-http://127.0.0.1:8000}/api/v1/chat
# Without a model the service's default answers.
body=$(jq -n --arg message "${CHAT_MESSAGE:-Hello}" --arg model "${CHAT_MODEL:-}" \
    '{$message, model_id: (if $model == "" then null else $model end)}')

# Each event is a line that begins with "data: "; an answer with an error status is JSON alone.
# At least every 15 s there is an event or a comment: a minute of silence is a dead connection.
# curl says itself if it can't connect (7), and then there is no answer that could be cut off.
silence=${CHAT_SILENCE_SECONDS:-60}
{
    curl -sSN --speed-limit 1 --speed-time "$silence" -H 'Content-Type: application/json' \
        -d "$body" "$url" || [ $? -ne 7 ] || echo '{"unreached": true}'
} |
    sed -un 's/^data: //; /^{/p' |
    jq -nj --unbuffered '
        (inputs |
            if .error then "\n\(.error.code): \(.error.message)\n" | halt_error(1)
            elif .unreached then "" | halt_error(1)
            elif .status then halt
            else .chunk end),
        ("\nThe answer was cut off\n" | halt_error(1))'

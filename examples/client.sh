#!/bin/sh
# Send a message and print the response as it arrives. Needs curl and jq.

url=${CHAT_URL:-http://127.0.0.1:8000}/api/v1/chat
# Without a model id, the service uses its default model.
body=$(jq -n --arg message "${CHAT_MESSAGE:-Hello}" --arg model "${CHAT_MODEL:-}" \
    '{$message, model_id: (if $model == "" then null else $model end)}')
# A heartbeat arrives every 15 s, so a connection that is silent for a minute is dead.
silence=${CHAT_SILENCE_SECONDS:-60}

# Each event is a line that begins with "data: ". An error response is one line of JSON, without a
# status. It is retried if it says so: then the exit status is 100 and the seconds to wait.
chat() {
    {
        curl -sSN --speed-limit 1 --speed-time "$silence" -H 'Content-Type: application/json' \
            -d "$body" "$url" || [ $? -ne 7 ] || echo '{"unreachable": true}'
    } |
        sed -un 's/^data: //; /^{/p' |
        jq -nj --unbuffered '
            (inputs |
                (.error.retry_after // 1) as $wait |
                (if .error.retryable and .status == null and $wait < 61 then 100 + $wait
                    else 1 end) as $exit |
                if .error then "\n\(.error.code): \(.error.message)\n" | halt_error($exit)
                elif .unreachable then "" | halt_error(1)
                elif .status then halt
                else .chunk end),
            ("\nThe connection was lost\n" | halt_error(1))'
}

for attempt in 1 2 3; do
    chat
    status=$?
    [ $status -gt 100 ] && [ $attempt -lt 3 ] || exit $status
    sleep $((status - 100))
done

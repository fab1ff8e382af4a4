// Asks, and prints the answer as it comes. Go 1.18 or newer, nothing else. Ctrl-C stops the answer.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"time"
)

// Without a model the service's default answers.
type asked struct {
	Message string `json:"message"`
	Model   string `json:"model_id,omitempty"`
}

func main() {
	// At least every 15 s there is an event or a comment: a minute of silence is a dead connection.
	silence := time.Duration(60)
	json.Unmarshal([]byte(os.Getenv("CHAT_SILENCE_SECONDS")), &silence)
	alive := time.AfterFunc(silence*time.Second, func() { log.Fatal("The answer was cut off: silence") })
	text, _ := json.Marshal(asked{os.Getenv("CHAT_MESSAGE"), os.Getenv("CHAT_MODEL")})
	// The connection ends with this process, and the provider stops too. Where the process lives on,
	// give the request a context and cancel that.
	response, err := http.Post(os.Getenv("CHAT_URL")+"/api/v1/chat", "application/json", bytes.NewReader(text))
	if err != nil {
		log.Fatal("The service could not be reached: ", err)
	}
	// No Scanner: it takes lines of 64 KiB at most, and an event can have 1 MiB.
	for lines := bufio.NewReader(response.Body); err == nil; alive.Reset(silence * time.Second) {
		text, err = lines.ReadBytes('\n')
		// One event of the answer, or the body of one with an error status. What is no JSON is a
		// blank line or a comment, and leaves it empty.
		var told struct {
			Chunk, Status string
			Error         *struct{ Code, Message string }
		}
		json.Unmarshal(bytes.TrimPrefix(text, []byte("data: ")), &told)
		if told.Error != nil {
			log.Fatalf("%s: %s", told.Error.Code, told.Error.Message)
		} else if told.Status == "done" {
			return
		}
		os.Stdout.WriteString(told.Chunk)
	}
	log.Fatal("The answer was cut off: ", err)
}

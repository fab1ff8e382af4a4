// Send a message and print the response as it arrives. Needs Go 1.18 or newer and no packages.
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

// Without a model id, the service uses its default model.
type request struct {
	Message string `json:"message"`
	Model   string `json:"model_id,omitempty"`
}

// An event of the stream, or the body of an error response.
type event struct {
	Chunk, Status string
	Error         *struct {
		Code, Message string
		Retryable     bool
		RetryAfter    time.Duration `json:"retry_after"`
	}
}

// Print the chunks. Return the terminal event, or the body of an error response.
func chat() (last event) {
	// A heartbeat arrives every 15 s, so a connection that is silent for a minute is dead.
	silence := time.Duration(60)
	json.Unmarshal([]byte(os.Getenv("CHAT_SILENCE_SECONDS")), &silence)
	timer := time.AfterFunc(silence*time.Second, func() { log.Fatal("The connection was lost: silence") })
	defer timer.Stop()
	line, _ := json.Marshal(request{os.Getenv("CHAT_MESSAGE"), os.Getenv("CHAT_MODEL")})
	response, err := http.Post(os.Getenv("CHAT_URL")+"/api/v1/chat", "application/json", bytes.NewReader(line))
	if err != nil {
		log.Fatal("Cannot connect to the service: ", err)
	}
	defer response.Body.Close()
	// Not a Scanner: it reads lines of at most 64 KiB, and an event can have 1 MiB.
	for lines := bufio.NewReader(response.Body); err == nil; timer.Reset(silence * time.Second) {
		line, err = lines.ReadBytes('\n')
		// Blank lines and comments are no JSON: the event stays empty.
		last = event{}
		json.Unmarshal(bytes.TrimPrefix(line, []byte("data: ")), &last)
		if last.Error != nil || last.Status != "" {
			return last
		}
		os.Stdout.WriteString(last.Chunk)
	}
	log.Fatal("The connection was lost: ", err)
	return
}

// Ctrl-C ends the process and closes its connection, and the service cancels the request to the
// model. In a program that goes on, give the request a context and cancel it.
func main() {
	end := chat()
	// Only an error response is retried: after text, a retry would store a second turn.
	for retries := 2; retries > 0 && end.Status == "" && end.Error.Retryable; retries-- {
		time.Sleep(time.Second + end.Error.RetryAfter*time.Second)
		end = chat()
	}
	if end.Error != nil {
		log.Fatalf("%s: %s", end.Error.Code, end.Error.Message)
	}
}
